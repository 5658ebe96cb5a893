#!/usr/bin/env python
"""Write the page of a run, and sample from its model: the command `far-scale report-run`."""

from far_scale.cli.report_run import main

if __name__ == "__main__":
    main()
