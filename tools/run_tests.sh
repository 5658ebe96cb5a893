#!/usr/bin/env bash
# Sets up, then checks style and types and runs the tests. With arguments: only pytest, with these arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The shell scripts' checker comes from Debian's packages where this user may install them.
check_shell_scripts() {
    if ! command -v shellcheck >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends shellcheck; } >/dev/null
    fi
    if ! command -v shellcheck >/dev/null; then
        echo "shellcheck is not installed: shell scripts are not checked" >&2
        return
    fi
    shellcheck slurm/*.sh tools/*.sh tests/harness/*.sh
}

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

if [ $# -gt 0 ]; then
    exec python -m pytest -q "$@"
else
    ruff check .
    ruff format --check .
    mypy far_scale tools
    check_shell_scripts
    # Two test files at a time, each process on one thread: many tests wait for other processes, or for SLURM.
    OMP_NUM_THREADS=1 exec python -m pytest -q -n 2 --dist loadfile
fi
