#!/usr/bin/env bash
# A long debug run with faults injected by seed, started again as a launcher would; it ends in a report:
#   launch/soak.sh [--steps=3000] [--every=100] [--seed=0] [--config=configs/arithmetic.py:debug] [--json]
#                  [--only=FAULT ...] [--folder=DIR] [--slack=1] [--config.SECTION.KNOB=VALUE ...]
# One fault in --every steps, in the mean: signals, killed workers, hanging verdicts, damaged checkpoints and records, a
# second run, a full disk (as root, which may mount a small one), a clock that jumps.
# Exit status: 0 where nothing was lost, else 1. 3,000 steps with 24 faults took 8 minutes on 2 cores.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/launch/environment.sh" test
cd "$root"
exec "$root/.venv/bin/python" -m tests.soak "$@"
