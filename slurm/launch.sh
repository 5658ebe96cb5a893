#!/usr/bin/env bash
# Runs a training job inside its allocation: launch.sh RECIPE [key=value ...]
#
# Checks the recipe, makes a snapshot of code and recipe in the run directory, starts one training process per task with
# srun, and requeues the job where that helps. Restarts use the snapshot; from the checkout they read only this file,
# environment.sh and site.sh. docs/slurm.md describes what each signal does.

# In a function, so that bash reads the whole file before it runs it, and edits of the file have no effect.
main() {
    set -euo pipefail
    local checkout host_python python=""
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    # shellcheck source=slurm/environment.sh
    source "$checkout/slurm/environment.sh"

    local snapshot=$PWD/runs/.jobs/$SLURM_JOB_ID start_status=0
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$snapshot" ]; then
        "$host_python" "$snapshot" start "$snapshot" || start_status=$?
    else
        [ ! -e far_scale/__init__.py ] || [ far_scale -ef "$checkout/far_scale" ] ||
            fail "$PWD: holds a far_scale of its own, which Python would take, not that of $checkout; submit elsewhere"
        local path=$checkout${PYTHONPATH:+:$PYTHONPATH}
        PYTHONPATH=$path "$host_python" -m far_scale.slurm check
        inside "PYTHONPATH=$path" "$python" -m far_scale.slurm prepare "$snapshot" "$@" || start_status=$?
    fi
    case $start_status in
        0) ;;
        3) exit 0 ;; # all steps are done
        2) exit 2 ;; # refused, the reason is printed
        *)
            in_container && printf 'error: %s (status %s, see above); is the container in %s right?\n' \
                "the job's start failed" "$start_status" "$checkout/slurm/site.sh" >&2
            exit "$start_status"
            ;;
    esac

    local options=(--kill-on-bad-exit=1)
    # Since SLURM 22.05 srun does not inherit this from the job.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # Each process sees all GPUs of its node and uses the one of its local rank.
    [ -z "${SLURM_JOB_GPUS:-}" ] || options+=(--gpu-bind=none)

    # In the background, since bash runs no trap while it waits for a foreground command.
    local step signal="" current status
    trap 'signal=TERM' TERM
    trap 'signal=USR1' USR1 USR2
    srun "${options[@]}" "${in_step[@]}" "$python" "$snapshot" train "$snapshot" &
    step=$!
    while :; do
        status=0
        wait "$step" || status=$?
        [ -n "$signal" ] || break
        current=$signal signal=""
        if [ "$current" = TERM ]; then # SLURM ends the job, and has signalled the training processes as well
            "$host_python" "$snapshot" after "$snapshot" || true
        else # a warning to only this shell, by --signal=B:USR1@...
            kill -s USR1 "$step" 2>/dev/null || true # srun forwards it
        fi
    done

    trap '' TERM USR1 USR2
    "$host_python" "$snapshot" after "$snapshot" "$status" || exit $?
    exit 0 # before bash looks for more in this file
}
main "$@"
