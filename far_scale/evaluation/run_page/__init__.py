"""The page of a run, report.html: one file that needs nothing else, made from the files of the run directory."""
