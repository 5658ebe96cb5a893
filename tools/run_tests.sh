#!/usr/bin/env bash
# Sets up, then checks style and types and runs the tests. With arguments: only pytest, with these arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy far_scale tools
fi
exec python -m pytest -q "$@"
