"""The life cycle of a SLURM job: snapshot, start, requeue, submission."""
