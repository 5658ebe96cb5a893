#!/usr/bin/env bash
# Sourced first by every job's script: the site's settings (slurm/site.sh, see site.example.sh), and where commands run.
#
# Input: `checkout`; optionally `python`, the Python to use without a container.
# Output:
#     host_python         Python on the node itself, to call SLURM's commands; with a container it needs only its standard
#                         library
#     python              Python for everything else; in the container, if the site has one
#     in_step             array, to put between srun with its options and the command of a step: the site's options of
#                         srun, and the container
#     inside [NAME=VALUE ...] COMMAND ...   runs a command once on this node; in the container, if the site has one
# shellcheck disable=SC2034,SC2154 # variables of the scripts that source this

fail() {
    trap - EXIT # which would print another line
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The file is read at each start, so that a new setting also reaches jobs that are already submitted.
site_file=$checkout/slurm/site.sh
site_settings=(SITE_SRUN_OPTIONS SITE_CONTAINER SITE_CONTAINER_OPTIONS)

check_site_file() {
    { [ -f "$site_file" ] && [ -r "$site_file" ]; } || fail "$site_file: is not a readable file"
    [[ $(<"$site_file") != *$'\r'* ]] ||
        fail "$site_file: has the line ends of Windows; take them out: sed -i 's/\r//' $site_file"
    bash -n "$site_file" || fail "$site_file: is not valid bash (see above)"
}

# Sets traps that end the job with a message if a line of the file itself fails. Not `set -eu`: modules and environments
# cannot be loaded under it. The last command is recorded to recognise `return`, which is no failure. `exit` would end the
# job, with status 0 even silently.
watch_site() {
    set +eu -T
    trap '[ "${BASH_SOURCE[0]}" != "$site_file" ] || fail "$site_file: line $LINENO failed (see above)"' ERR
    trap '[ "${FUNCNAME[0]:-}${BASH_SOURCE[0]:-}" != "source$site_file" ] || site_last=$BASH_COMMAND' DEBUG
    trap 'site_exits "$?"' EXIT
}
site_exits() { fail "$site_file: ends the job by exit (status $1, see above); it must be read to its end"; }

# Restores what the file may have changed by accident.
site_is_read() { # site_is_read STATUS
    set +T
    case $(trap -p EXIT) in *site_exits*) trap - EXIT ;; esac # else it is the site's own trap
    case $site_last in return*) [ "$1" = 0 ] || fail "$site_file: returns status $1 (see above)" ;; esac
    checkout=${site_before[0]} python=${site_before[1]} IFS=${site_before[3]}
    cd "${site_before[2]}" || exit
    set +eu
    case ${site_before[4]} in *e*) set -e ;; esac
    case ${site_before[4]} in *u*) set -u ;; esac
}

check_settings() {
    local name
    for name in $(compgen -v SITE_SRUN) $(compgen -v SITE_CONTAINER); do
        case " ${site_settings[*]} " in
            *" $name "*) ;;
            *) fail "$site_file: there is no setting $name, only ${site_settings[*]}; name your own variables differently" ;;
        esac
    done
    for name in "${site_settings[@]}"; do take_array "$name"; done
    [ ${#SITE_CONTAINER[@]} = 0 ] || [ ${#SITE_CONTAINER_OPTIONS[@]} = 0 ] ||
        fail "$site_file: SITE_CONTAINER and SITE_CONTAINER_OPTIONS are both set; take one"
    local options=("${SITE_SRUN_OPTIONS[@]}" "${SITE_CONTAINER_OPTIONS[@]}")
    # Check now, since otherwise the job would be requeued again and again.
    [ ${#options[@]} = 0 ] || [ -z "${SLURM_JOB_ID:-}" ] || srun "${options[@]}" --help >/dev/null ||
        fail "$site_file: srun does not take these options (see above)"
    # Also if the file lacks `export`: they would look right in it, and have no effect.
    for name in $(compgen -v NCCL_) $(compgen -v GLOO_) $(compgen -v UCX_) $(compgen -v MASTER_); do
        export "${name?}"
    done
}

take_array() { # take_array NAME: turns a plain variable into an array of at most one element
    local value=${!1:-}
    case $(declare -p "$1" 2>/dev/null) in 'declare -a'*) return ;; esac
    case $value in *[[:space:]]*) fail "$site_file: write an array, $1=(...), one word an element" ;; esac
    unset "$1"
    declare -ga "$1=(${value:+\"\$value\"})"
}

in_container() { [ $((${#SITE_CONTAINER[@]} + ${#SITE_CONTAINER_OPTIONS[@]})) -gt 0 ]; }

inside() {
    if [ ${#SITE_CONTAINER_OPTIONS[@]} = 0 ]; then
        "${SITE_CONTAINER[@]}" env -C "$PWD" "$@"
        return
    fi
    local options=(--overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "--nodelist=$SLURMD_NODENAME")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # In a step SLURM_NTASKS is the number of the step's tasks, but the command needs that of the job.
    srun "${options[@]}" "${in_step[@]}" "SLURM_NTASKS=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" "$@"
}

has_deepspeed() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' 2>/dev/null; }

find_python() { # without a container: PYTHON if set, else that of the active environment, else that of the checkout
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python "$checkout/.venv/bin/python"; do
        if has_deepspeed "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || break # no other one
    done
    fail "${PYTHON:-$checkout/.venv/bin/python}: is no Python with DeepSpeed; run tools/setup_env.sh in $checkout, or" \
        "set PYTHON, an environment or a container in $checkout/slurm/site.sh"
}

find_host_python() { # with a container
    local candidate=${HOST_PYTHON:-python3} version
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
        version=$("$candidate" --version 2>/dev/null) || version="not found"
        fail "$candidate on $(hostname): is not Python 3.9 or newer ($version), which a job needs beside the container;" \
            "load one in $checkout/slurm/site.sh, or set HOST_PYTHON there"
    fi
    printf '%s' "$candidate"
}

unset "${site_settings[@]}"
# Not in a function, where `declare` in the file would make local variables.
if [ -e "$site_file" ] || [ -L "$site_file" ]; then
    check_site_file
    site_before=("$checkout" "${python:-}" "$PWD" "$IFS" "$-") site_last=""
    watch_site
    # shellcheck source=/dev/null
    source "$site_file"
    site_status=$?
    trap - DEBUG ERR
    site_is_read "$site_status"
fi
check_settings
# --export: a job that was submitted with --export=NONE would keep the site's settings from its processes.
in_step=(--export=ALL "${SITE_SRUN_OPTIONS[@]}" "${SITE_CONTAINER_OPTIONS[@]}" "${SITE_CONTAINER[@]}")
# srun looks for the command on the node and may find another Python; env looks for it in the container. -C, since a
# container may start in another folder, where relative paths would be wrong.
! in_container || in_step+=(env -C "$PWD")
if in_container; then
    host_python=$(find_host_python) || exit
    python=${PYTHON:-python}
else
    python=${python:-$(find_python)} || exit
    host_python=$python
fi
