#!/usr/bin/env bash
# All tests: bash run_tests.sh [pytest's options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source environment.sh
ruff check .
mypy
exec python -m pytest -n auto --maxprocesses=4 --dist worksteal "$@"
