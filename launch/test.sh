#!/usr/bin/env bash
# Sets up .venv with what the tests need and runs them:  launch/test.sh [--all] [pytest arguments]
# A process for each core and one more, as some tests wait; -n 0 runs all in one, as a debugger needs. What runs when:
# tests/README.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/environment.sh" test
cd "$root"
set -- -n "$(($(getconf _NPROCESSORS_ONLN) + 1))" --dist loadfile --no-loadscope-reorder "$@"
echo "launch/test.sh: python -m pytest $*"
exec "$root/.venv/bin/python" -m pytest "$@"
