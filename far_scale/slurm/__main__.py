"""`python -m far_scale.slurm COMMAND ...`, or `python SNAPSHOT COMMAND ...` for a snapshot's own code.

    prepare LINK RECIPE [key=value ...] [--accept-changes]
                                          check the recipe, make the job's snapshot, point LINK at it, and start
    start SNAPSHOT                        log a further start on that snapshot
    train SNAPSHOT                        train; one process of the job
    after SNAPSHOT [STATUS]               after training exited with STATUS, or while SLURM ends the job: requeue or not
    check                                 refuse a job whose warning would stop every start at once, as `start` does

slurm/launch.sh and the jobs of tools/submit.py call these; encode_latents.sh and evaluate.sh call `check`.
`prepare` and `start` exit with status 3 where all steps are done, so that there is nothing to train.

`prepare` and `train` run where far_scale's packages are installed: in the site's container, if it has one. `start`,
`after` and `check` call SLURM's commands, so they run on the node itself, with only Python 3.9 and its standard
library.
"""

from __future__ import annotations

import sys
from pathlib import Path

from far_scale.slurm.job import Job, check_warning
from far_scale.slurm.lifecycle import after, prepare, start
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError


@command_line
def main() -> None:
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command == "train" and len(arguments) == 1:
        from far_scale.slurm.task import train  # first: signals must be set up before torch is loaded

        train(Path(arguments[0]))
    elif command == "prepare" and len(arguments) >= 2:
        sys.exit(prepare(Path(arguments[0]), arguments[1], arguments[2:]))
    elif command == "start" and len(arguments) == 1:
        check_warning(Job.this().number)  # again: the limit may have changed since the last start
        sys.exit(start(Path(arguments[0])))
    elif command == "after" and len(arguments) in (1, 2):
        sys.exit(after(Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else None))
    elif command == "check" and not arguments:
        check_warning(Job.this().number)
    else:
        raise UserError(f"{' '.join(sys.argv[1:]) or 'no command'}: is not one of\n{__doc__}")


if __name__ == "__main__":
    main()
