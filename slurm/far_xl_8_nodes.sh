#!/usr/bin/env bash
# FAR-XL, UCF-101 at 256 px by class: 8 nodes of 8 GPUs, one rank for each of the recipe's 64 lanes.
#
#     sbatch slurm/far_xl_8_nodes.sh                                           # 64 lanes x 4 clips a batch
#
# The number of ranks must divide the lanes. A run with checkpoints can change its lanes with --accept-changes. From
# step 200000 of far_xl.sh's 400000, 25000 steps with 8 times the batch have as many clips as the remaining steps.
#
#     sbatch slurm/far_xl_8_nodes.sh run_dir=runs/far_xl_ucf101_256_cond train.steps=225000 --accept-changes
#
# Submit from the checkout, or set FAR_SCALE to it.
#SBATCH --job-name=far_xl_8_nodes
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=2-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
exec bash "${FAR_SCALE:-$SLURM_SUBMIT_DIR}/slurm/launch.sh" far_xl_ucf101_256_cond_8_nodes "$@"
