#!/usr/bin/env bash
# Which Python a job runs: PYTHON where that is set, else the active environment's, else that of the checkout's .venv.
# The other scripts source this.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

has_deepspeed() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' 2>/dev/null; }

find_python() { # find_python CHECKOUT: prints it
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python "$1/.venv/bin/python"; do
        if has_deepspeed "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || break # asked for this one
    done
    fail "${PYTHON:-$1/.venv/bin/python}: is no Python with DeepSpeed; run tools/setup_env.sh in $1, or set PYTHON"
}
