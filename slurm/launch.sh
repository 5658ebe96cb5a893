#!/usr/bin/env bash
# What every training job runs inside its allocation: launch.sh RECIPE [key=value ...]
#
# Checks the recipe, makes a snapshot of code and recipe in the run directory, starts one training process a task by
# srun, and starts the job again where that helps. Restarts of the job use its snapshot; of the checkout they only read
# this file, environment.sh and site.sh. docs/slurm.md says what happens on which signal.

# In a function, so that bash has read all of this file before it runs any of it and nobody can change it underneath.
main() {
    set -euo pipefail
    local checkout host_python python=""
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # shellcheck source=slurm/environment.sh
    source "$checkout/slurm/environment.sh"

    local snapshot=$PWD/runs/.jobs/$SLURM_JOB_ID begun=0
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$snapshot" ]; then
        "$host_python" "$snapshot" start "$snapshot" || begun=$?
    else
        [ ! -e far_scale/__init__.py ] || [ far_scale -ef "$checkout/far_scale" ] ||
            fail "$PWD: holds a far_scale of its own, which Python would take, not that of $checkout; submit elsewhere"
        local path=$checkout${PYTHONPATH:+:$PYTHONPATH}
        PYTHONPATH=$path "$host_python" -m far_scale.slurm check
        inside "PYTHONPATH=$path" "$python" -m far_scale.slurm prepare "$snapshot" "$@" || begun=$?
    fi
    case $begun in
        0) ;;
        3) exit 0 ;; # all steps are done
        2) exit 2 ;; # refused, with a line that says why
        *)
            in_container && printf 'error: %s (status %s, see above); is the container in %s right?\n' \
                "the job's start failed" "$begun" "$checkout/slurm/site.sh" >&2
            exit "$begun"
            ;;
    esac

    local options=(--kill-on-bad-exit=1)
    # Since SLURM 22.05 srun no longer takes this from the job by itself.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # Each process sees all GPUs of its node and takes the one of its local rank.
    [ -z "${SLURM_JOB_GPUS:-}" ] || options+=(--gpu-bind=none)

    # In the background, for bash runs no trap while it waits for a foreground command.
    local step signal="" taken status
    trap 'signal=TERM' TERM
    trap 'signal=USR1' USR1 USR2
    srun "${options[@]}" "${in_step[@]}" "$python" "$snapshot" train "$snapshot" &
    step=$!
    while :; do
        status=0
        wait "$step" || status=$?
        [ -n "$signal" ] || break
        taken=$signal signal=""
        if [ "$taken" = TERM ]; then # SLURM ends the job, and told the training processes as well
            "$host_python" "$snapshot" after "$snapshot" || true
        else # a warning that only this shell got, by --signal=B:USR1@...
            kill -s USR1 "$step" 2>/dev/null || true # srun hands it on
        fi
    done

    trap '' TERM USR1 USR2
    "$host_python" "$snapshot" after "$snapshot" "$status" || exit $?
    exit 0 # before bash looks for more in this file
}
main "$@"
