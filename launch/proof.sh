#!/usr/bin/env bash
# The comparison of allocation rules that tests/benchmarks/proof/plan.py fixes, in pieces that can be stopped and gone
# on with; it ends in configs/recorded/proof/report.md:
#   launch/proof.sh [--quick] [--family NAME ...] [--batch small|large ...] [--arms NAME ...] [--seeds N ...]
#                   [--role tuning|test] [--jobs=2] [--folder=runs/proof] [--record=DIR] [--minutes=M] [--keep]
#                   [--signal] [--report] [--json]
# --quick runs one family, two arms and three seeds anew, on 2 cores. What is recorded is not run again.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/environment.sh" test
cd "$root"
exec "$root/.venv/bin/python" -m tests.benchmarks.proof "$@"
