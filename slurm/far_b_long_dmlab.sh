#!/usr/bin/env bash
# FAR-B-Long, DMLab at 64 px, 300 frames by action: one node of 8 GPUs, one rank for each of the recipe's 8 lanes.
#
#     sbatch slurm/far_b_long_dmlab.sh
#     sbatch --nodes=4 slurm/far_b_long_dmlab.sh data.lanes=32 data.clips_per_pack=1     # four nodes: 32 lanes x 1 clip a batch
#
# The number of ranks must divide the lanes. A run with checkpoints can change its lanes with --accept-changes.
# Submit from the checkout, or set FAR_SCALE to it.
#SBATCH --job-name=far_b_long_dmlab
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=2-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
exec bash "${FAR_SCALE:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" far_b_long_dmlab_64 "$@"
