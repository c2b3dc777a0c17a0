#!/usr/bin/env bash
# Sets up .venv with what the tests need and runs them:  launch/test.sh [pytest arguments]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/environment.sh" test
cd "$root"
echo "launch/test.sh: python -m pytest $*"
exec "$root/.venv/bin/python" -m pytest "$@"
