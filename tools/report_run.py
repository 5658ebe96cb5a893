#!/usr/bin/env python
"""Sample from a run's model and plot its losses: the command `far-scale report-run`."""

from far_scale.cli.report_run import main

if __name__ == "__main__":
    main()
