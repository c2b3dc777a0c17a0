#!/usr/bin/env bash
# Sets up .venv and runs the main job on this machine:
#   launch/local.sh [CONFIG] [--config.SECTION.KNOB=VALUE ...] [--workdir=DIR] [--mode=evaluate|preflight]
# CONFIG is configs/arithmetic.py unless given. The same command again goes on where it stopped.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
config="$root/configs/arithmetic.py"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
  config="$1"; shift
  [ -e "${config%%:*}" ] || config="$root/$config"
fi
extras=""
# On a TPU VM, and for the TPU compiler, which runs anywhere.
if [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ] || [[ " $*" == *" --mode=preflight"* ]]; then extras="tpu"; fi
"$root/launch/environment.sh" "$extras"
case " $*" in
  *" --workdir"*) ;;
  *) name="$(basename "${config//.py/}")"; set -- "$@" "--workdir=$root/runs/${name//:/_}";;
esac
echo "launch/local.sh: python -m kr_jax.main --config=$config $*"
# configs/ is not installed; it is found beside this script from any directory.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -m kr_jax.main --config="$config" "$@"
