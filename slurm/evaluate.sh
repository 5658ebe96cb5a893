#!/usr/bin/env bash
# Evaluates the checkpoints of a run while it trains, without delaying it: scores by step, as a file and a plot.
#
#     sbatch slurm/evaluate.sh RUN --protocol NAME --videos V
#     sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/evaluate.sh RUN ...      # one task a GPU
#
# The options are those of tools/evaluate.py --follow; results are in RUN/evaluation/NAME. The job may be submitted before
# the training starts, and it ends when all steps are done and evaluated. If it is killed or reaches its time limit, it
# resumes where it stopped. Submit from the checkout, or set FAR_SCALE to it.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
main() {
    set -euo pipefail
    local checkout=${FAR_SCALE:-$SLURM_SUBMIT_DIR} host_python python="" step
    # shellcheck source=slurm/environment.sh
    source "$checkout/slurm/environment.sh"
    local path=$checkout${PYTHONPATH:+:$PYTHONPATH}
    PYTHONPATH=$path "$host_python" -m far_scale.slurm check

    local of_srun=(--kill-on-bad-exit=1) options=(--follow)
    # Since SLURM 22.05 srun does not inherit this from the job.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || of_srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # Each process sees all GPUs of its node and uses the one of its local rank.
    [ -z "${SLURM_JOB_GPUS:-}" ] || of_srun+=(--gpu-bind=none) options+=(--device cuda)
    local warned="" status=0
    trap 'warned=1' USR1
    srun "${of_srun[@]}" "${in_step[@]}" env "PYTHONPATH=$path" "$python" "$checkout/tools/evaluate.py" "$@" "${options[@]}" &
    step=$!
    wait "$step" || status=$?
    if [ -n "$warned" ]; then
        scontrol requeue "$SLURM_JOB_ID"
        wait "$step" || status=$?
    fi
    exit "$status"
}
main "$@"
