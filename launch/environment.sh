#!/usr/bin/env bash
# Makes .venv and installs the project in it, with an extra of setup.cfg:  launch/environment.sh [EXTRA]
# Does nothing where that is done. PYTHON names the interpreter (python3 unless set).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-train}"
# A line a finished installation: what was asked for, by which setup.cfg.
done="$extra $(cksum < "$root/setup.cfg")"
if grep -qxF "$done" "$root/.venv/installed" 2>/dev/null; then exit 0; fi
if [ ! -x "$root/.venv/bin/python" ]; then
  echo "environment: making $root/.venv"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kr_jax needs Python 3.11 or newer; set PYTHON to one")'
  "${PYTHON:-python3}" -m venv "$root/.venv"
fi
echo "environment: installing kr_jax[$extra] (about a minute the first time)"
"$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -e "${root}[$extra]"
# All cores compile what pip would compile on one. A file that no Python compiles is not imported either.
"$root/.venv/bin/python" -W ignore -m compileall -qq -j 0 "$root/.venv/lib" || true
echo "$done" >> "$root/.venv/installed"
