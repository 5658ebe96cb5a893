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
    shellcheck slurm/*.sh tools/*.sh tests/*.sh
}

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy far_scale tools
    check_shell_scripts
fi
exec python -m pytest -q "$@"
