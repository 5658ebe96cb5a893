"""What a SLURM job runs besides training: its snapshot, the record of its starts, what follows when training ends."""
