#!/usr/bin/env bash
# Encodes folders of videos to latent shards as a job array: one folder, one shard set, one element of the array.
#
#     sbatch --array=1-$(wc -l < folders.txt) slurm/encode_latents.sh folders.txt OUT --autoencoder NAME [more options]
#
# folders.txt has a folder a line. Line i becomes the shard set OUT/NAME_OF_THE_FOLDER, so their last names must differ.
# The options are those of tools/encode_latents.py. An element that is killed or meets its time limit goes on where it
# was. Submit from the checkout, or set FAR_SCALE to it.
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
    local checkout=${FAR_SCALE:-$SLURM_SUBMIT_DIR} python folder encoder warned="" status=0
    # shellcheck source=slurm/python.sh
    source "$checkout/slurm/python.sh"
    python=$(find_python "$checkout")
    if [ $# -lt 2 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
        fail "submit with sbatch --array=1-N slurm/encode_latents.sh FOLDERS.txt OUT --autoencoder NAME, N the lines of it"
    fi
    folder=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
    [ -n "$folder" ] || fail "$1: has no line $SLURM_ARRAY_TASK_ID; let --array end with its last"

    local options=(--videos "$folder" --out "$2/$(basename "$folder")" --workers "${SLURM_CPUS_PER_TASK:-1}")
    [ -z "${SLURM_JOB_GPUS:-}" ] || options+=(--device cuda)
    trap 'warned=1' USR1
    PYTHONPATH=$checkout "$python" "$checkout/tools/encode_latents.py" "${options[@]}" "${@:3}" &
    encoder=$!
    wait "$encoder" || status=$?
    if [ -n "$warned" ]; then
        scontrol requeue "$SLURM_JOB_ID"
        wait "$encoder" || status=$?
    fi
    exit "$status"
}
main "$@"
