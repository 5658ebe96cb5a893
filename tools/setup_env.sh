#!/usr/bin/env bash
# Makes the virtual environment .venv with far_scale and all it needs; does nothing when it is there already.
# quickstart.sh and run_tests.sh call this; it may also be called alone: bash tools/setup_env.sh
# A .venv that something else has made is left as it is, and refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CPU_TORCH="torch==2.13.0" # one known-good version where no GPU driver narrows the choice
VENV=.venv
STAMP=$VENV/.setup-checksum # empty until all is installed; also the lock of those who install

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The stamp changes with what is installed, and with the folder, since an environment cannot be moved.
checksum() { { pwd -P && cat setup.py pyproject.toml tools/setup_env.sh requirements/cpu.txt; } | sha256sum | cut -d ' ' -f 1; }

# What the system lacks comes from Debian's packages where this user may install them.
apt_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing $* with apt-get"
    # One at a time: run_tests.sh installs others meanwhile.
    { flock /var/lib/apt apt-get update -qq && DEBIAN_FRONTEND=noninteractive flock /var/lib/apt apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null
}

# Prints the first Python >= 3.10 (one that sees a GPU through its own torch is preferred), or nothing.
find_python() {
    local candidate first=""
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        first=${first:-$candidate}
        if has_gpu && has_cuda_torch "$candidate"; then
            first=$candidate
            break
        fi
    done
    printf '%s' "$first"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() { "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; }

timed() { # timed WHAT COMMAND...: runs it, says what it is and how long it took
    local what=$1 start=$SECONDS
    shift
    say "$what ..."
    "$@" || return
    say "$what: $((SECONDS - start)) s"
}

is_complete() { [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(checksum)" ] && "$VENV/bin/python" -c '' 2>/dev/null; }

if is_complete; then
    exit 0
fi
if [ -L "$VENV" ]; then
    fail "$VENV is a link to $(readlink "$VENV"), whose files would be replaced; remove the link and start again"
elif [ -e "$VENV" ] && [ ! -f "$STAMP" ] && [ -n "$(ls -A "$VENV")" ]; then
    fail "$VENV was not made by tools/setup_env.sh, which would replace it; rename or remove it and start again"
fi
mkdir -p "$VENV"
exec 9>>"$STAMP"
locked=0
flock --nonblock 9 || locked=$? # 1: another process has it; more: this file system has no locks
if [ $locked = 1 ]; then
    say "waiting until another process has set up $VENV"
    flock 9
    if is_complete; then
        exit 0
    fi
fi

PYTHON=$(find_python)
if [ -z "$PYTHON" ]; then
    apt_install python3 python3-venv || true
    PYTHON=$(find_python)
    [ -n "$PYTHON" ] || fail "there is no Python >= 3.10 here; install one (Debian, Ubuntu: apt-get install python3 python3-venv)"
fi
if ! has_venv "$PYTHON"; then
    apt_install python3-venv || true
    has_venv "$PYTHON" || fail "$PYTHON cannot make virtual environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
fi
# torch.compile needs a compiler and Python's headers; training works without.
if ! command -v c++ >/dev/null || ! has_headers "$PYTHON"; then
    apt_install g++ python3-dev || say "no C++ compiler or no Python headers here: compiled kernels will not be available"
fi

VENV_OPTIONS=()
if has_gpu && has_cuda_torch "$PYTHON"; then
    say "using the torch that $PYTHON has for this machine's GPU"
    VENV_OPTIONS+=(--system-site-packages)
fi
find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$STAMP" -exec rm -rf {} +
: >"$STAMP"
timed "virtual environment in $VENV from $("$PYTHON" --version)" "$PYTHON" -m venv ${VENV_OPTIONS[@]+"${VENV_OPTIONS[@]}"} "$VENV"

# Without bytecode, which takes a minute for all files; Python writes it for what is loaded.
PIP=("$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-compile)
LOCK=()
if ! has_gpu; then
    LOCK=(--constraint requirements/cpu.txt) # the versions that the tests are known to pass with
    timed "installing $CPU_TORCH" "${PIP[@]}" "$CPU_TORCH" || fail "pip could not install $CPU_TORCH (see above)"
elif ! has_cuda_torch "$VENV/bin/python"; then
    timed "installing torch>=2.9 for the GPU" "${PIP[@]}" "torch>=2.9" || fail "pip could not install torch>=2.9 (see above)"
fi
timed "installing far_scale and what it needs (one to two minutes)" "${PIP[@]}" ${LOCK[@]+"${LOCK[@]}"} --editable '.[demo,dev,slurm,tensorboard,wandb]' ||
    fail "pip could not install far_scale (see above); fix that and start again"

# Only tests import it. With all that it requires it would replace numpy, and torchvision need not fit a torch for CPUs.
timed "installing mosaicml-streaming, which the tests hold our MDS files against" "${PIP[@]}" --no-deps \
    mosaicml-streaming brotli catalogue cramjam python-snappy xxhash zstd ||
    say "mosaicml-streaming could not be installed: the tests against it will be skipped"

checksum >"$STAMP"
