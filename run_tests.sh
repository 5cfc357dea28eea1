#!/usr/bin/env bash
# All tests: bash run_tests.sh [pytest's options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source environment.sh
unset PYTHONDONTWRITEBYTECODE     # hundreds of Pythons are started, and each would compile all that it imports
ruff check .
mypy
# More than two cores have work for: many tests wait for what they have started. Lots of tests by tests/conftest.py.
exec python -m pytest -n 4 --dist loadscope --no-loadscope-reorder "$@"
