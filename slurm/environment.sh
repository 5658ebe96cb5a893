#!/usr/bin/env bash
# What every job's script sources first: the site's settings (slurm/site.sh, see site.example.sh), and where commands run.
#
# Before: `checkout`; and `python`, for a script that knows which one to take where there is no container.
# After:
#     host_python         Python on the node itself, for what calls SLURM's commands. Beside a container its standard
#                         library is enough
#     python              for all else; in the container, where the site has one
#     in_step             array, between srun with its own options and the command of a step: the site's options of srun,
#                         and the container
#     inside COMMAND ...  runs a command once on this node; in the container, where the site has one
# shellcheck disable=SC2034,SC2154 # variables of the scripts that source this

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The file is read anew at each start, so that a setting that a cluster needs reaches the jobs that are under way.
read_site() {
    local site=$checkout/slurm/site.sh flags=$-
    [ -e "$site" ] || return 0
    bash -n "$site" || fail "$site: is not valid bash (see above)"
    # Modules and environments cannot be loaded under these. It is the lines of the file itself that must not fail.
    set +eu
    trap '[ "${BASH_SOURCE[0]}" != "$site" ] || fail "$site: line $LINENO failed (see above)"' ERR
    # shellcheck source=/dev/null
    source "$site"
    trap - ERR
    case $flags in *e*) set -e ;; esac
    case $flags in *u*) set -u ;; esac
    case ${SITE_CONTAINER[*]:0:1} in *' '*) fail "$site: write an array, SITE_CONTAINER=(...), one word an element" ;; esac
    [ ${#SITE_CONTAINER[@]} = 0 ] || [ ${#SITE_CONTAINER_OPTIONS[@]} = 0 ] ||
        fail "$site: SITE_CONTAINER and SITE_CONTAINER_OPTIONS are both set; take one"
}

in_container() { [ $((${#SITE_CONTAINER[@]} + ${#SITE_CONTAINER_OPTIONS[@]})) -gt 0 ]; }

inside() {
    if [ ${#SITE_CONTAINER_OPTIONS[@]} = 0 ]; then
        "${SITE_CONTAINER[@]}" "$@"
        return
    fi
    local options=(--overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "--nodelist=$SLURMD_NODENAME")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # In a step SLURM_NTASKS counts the step's tasks, and the command wants to know the job's.
    srun "${options[@]}" "${in_step[@]}" "SLURM_NTASKS=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}" "$@"
}

has_deepspeed() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' 2>/dev/null; }

find_python() { # without a container: PYTHON where that is set, else the active environment's, else the checkout's
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python "$checkout/.venv/bin/python"; do
        if has_deepspeed "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || break # asked for this one
    done
    fail "${PYTHON:-$checkout/.venv/bin/python}: is no Python with DeepSpeed; run tools/setup_env.sh in $checkout, or" \
        "set PYTHON, an environment or a container in $checkout/slurm/site.sh"
}

find_host_python() { # beside a container
    local candidate=${HOST_PYTHON:-python3} version
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
        version=$("$candidate" --version 2>/dev/null) || version="not found"
        fail "$candidate on $(hostname): is not Python 3.9 or newer ($version), which a job needs beside the container;" \
            "load one in $checkout/slurm/site.sh, or set HOST_PYTHON there"
    fi
    printf '%s' "$candidate"
}

SITE_SRUN_OPTIONS=() SITE_CONTAINER=() SITE_CONTAINER_OPTIONS=()
read_site
# --export: a job that was submitted with --export=NONE would keep the site's settings from its processes.
in_step=(--export=ALL "${SITE_SRUN_OPTIONS[@]}" "${SITE_CONTAINER_OPTIONS[@]}" "${SITE_CONTAINER[@]}")
# srun looks for a command on the node, where it may find another Python; env looks for it in the container.
[ ${#SITE_CONTAINER_OPTIONS[@]} = 0 ] || in_step+=(env)
if in_container; then
    host_python=$(find_host_python) || exit
    python=${PYTHON:-python}
else
    python=${python:-$(find_python)} || exit
    host_python=$python
fi
