#!/usr/bin/env bash
# Writes requirements/cpu.txt and requirements/cuda.txt: one version of every package that setup.py leads to, for
# Python 3.10 to 3.13. It reads the packages' metadata and installs nothing; needs uv (pip install uv).
# Use them as constraints: pip install --constraint requirements/cuda.txt --editable .
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0" # the version that the tests run with, see setup_env.sh

lock() {
    uv pip compile --universal --python-version 3.10 --no-header --no-annotate --quiet \
        --extra demo --extra dev --extra slurm --extra tensorboard --extra wandb setup.py - <<<"$TORCH"
}

mkdir -p requirements
header="# Made by tools/lock.sh. Use it as a constraint: pip install --constraint"
all=$(lock)
printf '%s requirements/cuda.txt ...\n%s\n' "$header" "$all" >requirements/cuda.txt
printf '%s requirements/cpu.txt ...\n' "$header" >requirements/cpu.txt
grep -Ev '^(nvidia-|cuda-|triton=)' <<<"$all" >>requirements/cpu.txt
