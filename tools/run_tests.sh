#!/usr/bin/env bash
# Sets up, then checks style and types and runs the tests.
#
#   tools/run_tests.sh              everything: the gate for a change
#   tools/run_tests.sh --fast       style, types and the tests that are not marked slow: for every edit
#   tools/run_tests.sh ARGUMENTS    only pytest, with these arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Of Debian's packages, where this user may install them: the shell scripts' checker, and a browser for the tests of the page.
install_command() { # install_command PACKAGE
    if ! command -v "$1" >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1"; } >/dev/null
    fi
}

check_shell_scripts() {
    install_command shellcheck || true
    if ! command -v shellcheck >/dev/null; then
        echo "shellcheck is not installed: shell scripts are not checked" >&2
        return
    fi
    shellcheck slurm/*.sh tools/*.sh tests/harness/*.sh
}

check_style() {
    ruff check .
    ruff format --check .
    check_shell_scripts
}

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
# Test files are spread over processes, each on one thread; four, since many tests wait for other processes or SLURM.
in_parallel=(-n 4 --dist loadfile --no-loadscope-reorder)

check_and_test() { # check_and_test PYTEST_ARGUMENTS...
    check_style
    install_command chromium || echo "chromium could not be installed: tests in a browser are skipped" >&2
    mypy far_scale tools &
    local types=$!
    OMP_NUM_THREADS=1 python -m pytest -q "${in_parallel[@]}" "$@"
    wait "$types"
}

case "${1-}" in
    "") check_and_test ;;
    --fast) check_and_test -m "not slow" "${@:2}" ;;
    *) exec python -m pytest -q "$@" ;;
esac
