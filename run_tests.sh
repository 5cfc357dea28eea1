#!/usr/bin/env bash
# All tests: bash run_tests.sh [pytest's options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source environment.sh
unset PYTHONDONTWRITEBYTECODE     # hundreds of Pythons are started, and each would compile all that it imports
ruff check .
mypy & types=$!                   # at the same time
# More than two cores have work for: many tests wait for what they have started. Lots of tests by tests/conftest.py.
python -m pytest -n 6 --dist loadscope --no-loadscope-reorder "$@" && tests=0 || tests=$?
wait "$types" && exit "$tests"
