#!/usr/bin/env bash
# Encodes videos to one latent shard set with a job array: element i writes its part of the shards; a last job merges.
#
#     job=$(sbatch --parsable --array=0-63 slurm/encode_latents.sh --videos V --out SHARDS --autoencoder NAME)
#     sbatch --dependency=afterany:$job slurm/encode_latents.sh --videos V --out SHARDS --autoencoder NAME --merge --tasks 64
#
# The options are those of tools/encode_latents.py, the same for both. If shards are missing, the merge names the tasks to
# run again: --array=5,17 and the option --tasks 64. An element that is killed or reaches its time limit resumes where it
# stopped. Without --array the job encodes all and merges. Submit from the checkout, or set FAR_SCALE to it.
#SBATCH --job-name=encode_latents
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
main() {
    set -euo pipefail
    local checkout=${FAR_SCALE:-$SLURM_SUBMIT_DIR} host_python python="" encoder
    # shellcheck source=slurm/environment.sh
    source "$checkout/slurm/environment.sh"
    local path=$checkout${PYTHONPATH:+:$PYTHONPATH}
    PYTHONPATH=$path "$host_python" -m far_scale.slurm check

    local options=(--workers "${SLURM_CPUS_PER_TASK:-1}")
    [ -z "${SLURM_JOB_GPUS:-}" ] || options+=(--device cuda)
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        # for an array that starts at 0; a --tasks of the user comes later and overrides this
        options+=(--task "$SLURM_ARRAY_TASK_ID" --tasks "$((SLURM_ARRAY_TASK_MAX + 1))")
    fi
    local warned="" status=0
    trap 'warned=1' USR1
    inside "PYTHONPATH=$path" "$python" "$checkout/tools/encode_latents.py" "${options[@]}" "$@" &
    encoder=$!
    wait "$encoder" || status=$?
    if [ -n "$warned" ]; then
        scontrol requeue "$SLURM_JOB_ID"
        wait "$encoder" || status=$?
    fi
    exit "$status"
}
main "$@"
