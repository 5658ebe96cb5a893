"""`python -m far_scale.launch` is `python -m far_scale.slurm`, for jobs that were submitted when it had this name.

SLURM keeps a copy of a batch script, so a pending or requeued slurm/evaluate.sh or encode_latents.sh still calls it.
"""

from far_scale.slurm.__main__ import main

if __name__ == "__main__":
    main()
