"""`python -m far_scale.slurm COMMAND ...`, or `python SNAPSHOT COMMAND ...` for a snapshot's own code.

    prepare LINK RECIPE [key=value ...] [--accept-changes]
                                          check the recipe, make the job's snapshot, point LINK at it, note the start
    start SNAPSHOT                        note a further start on that snapshot
    train SNAPSHOT                        train; one process of the job
    after SNAPSHOT [STATUS]               say and do what follows when training ended so, or while SLURM ends the job
    check                                 refuse a job whose warning would stop each start at once; so does `start`

slurm/launch.sh and the jobs of tools/submit.py call these, encode_latents.sh and evaluate.sh beside it call `check`.
`prepare` and `start` exit with status 3 where all steps are done, so that there is nothing to train.

`prepare` and `train` run where far_scale's packages are: in the site's container, where it has one. `start`, `after`
and `check` call SLURM's commands, so they run on the node itself, with nothing but Python 3.9 and its library.
"""

from __future__ import annotations

import sys
from pathlib import Path

from far_scale.slurm.job import Job, check_warning
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError


@command_line
def main() -> None:
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command == "train" and len(arguments) == 1:
        from far_scale.slurm.task import train  # first, for it must see to the signals before torch is loaded

        train(Path(arguments[0]))
    elif command == "prepare" and len(arguments) >= 2:
        from far_scale.slurm.start import prepare

        sys.exit(prepare(Path(arguments[0]), arguments[1], arguments[2:]))
    elif command == "start" and len(arguments) == 1:
        from far_scale.slurm.start import start

        check_warning(Job.this().number)  # here again: the limit may be changed between starts
        sys.exit(start(Path(arguments[0])))
    elif command == "after" and len(arguments) in (1, 2):
        from far_scale.slurm.after import after

        sys.exit(after(Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else None))
    elif command == "check" and not arguments:
        check_warning(Job.this().number)
    else:
        raise UserError(f"{' '.join(sys.argv[1:]) or 'no command'}: is not one of\n{__doc__}")


if __name__ == "__main__":
    main()
