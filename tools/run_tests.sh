#!/usr/bin/env bash
# Sets up, then checks style and types and runs the tests.
#
#   tools/run_tests.sh              everything: the gate for a change
#   tools/run_tests.sh --fast       style, types and the tests that are not marked slow: for every edit
#   tools/run_tests.sh ARGUMENTS    only pytest, with these arguments
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Of Debian's packages, where this user may install them: the shell scripts' checker, a browser for the tests of the page,
# and SLURM. What cannot be installed is missed later on, with a message.
install_packages() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    local package missing=()
    for package in shellcheck chromium; do
        command -v "$package" >/dev/null || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        flock /var/lib/apt apt-get update -qq >/dev/null || true
        for package in "${missing[@]}"; do
            DEBIAN_FRONTEND=noninteractive flock /var/lib/apt \
                apt-get install -y -qq --no-install-recommends "$package" >/dev/null || true
        done
    fi
    flock /var/lib/apt bash tests/harness/slurm_cluster.sh install || true
}

check_shell_scripts() {
    if ! command -v shellcheck >/dev/null; then
        echo "shellcheck is not installed: shell scripts are not checked" >&2
        return
    fi
    shellcheck slurm/*.sh tools/*.sh tests/harness/*.sh
}

set_up() {
    bash tools/setup_env.sh
    export PATH="$PWD/.venv/bin:$PATH"
    # Packages are installed without bytecode: it is written for what is loaded, or else every process compiles its own.
    unset PYTHONDONTWRITEBYTECODE
}

check_and_test() { # check_and_test PYTEST_ARGUMENTS...
    install_packages & # beside Python's, which take as long
    local packages=$!
    set_up
    ruff check .
    ruff format --check .
    wait "$packages"
    check_shell_scripts
    command -v chromium >/dev/null || echo "chromium is not installed: tests in a browser are skipped" >&2
    mypy far_scale tools &
    local types=$!
    # Test files are spread over processes, each on one thread; four, since many tests wait for other processes or SLURM.
    OMP_NUM_THREADS=1 python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder "$@"
    wait "$types"
}

case "${1-}" in
    "") check_and_test ;;
    --fast) check_and_test -m "not slow" "${@:2}" ;;
    *)
        set_up
        exec python -m pytest -q "$@"
        ;;
esac
