#!/usr/bin/env bash
# Sets up .venv and runs the main job on this machine:
#   launch/local.sh [CONFIG] [--config.SECTION.KNOB=VALUE ...] [--workdir=DIR] [--mode=evaluate|export|preflight]
# CONFIG is configs/ciphers.py unless given; of a run that is evaluated or exported, its own. The same command again
# goes on where it stopped.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
config="$root/configs/ciphers.py" given=""
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
  config="$1" given=1; shift
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
if [ -n "$given" ] || [[ ! " $*" =~ " --mode="(evaluate|export) ]]; then set -- "--config=$config" "$@"; fi
echo "launch/local.sh: python -m kr_jax.main $*"
# configs/ is not installed; it is found beside this script from any directory.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -m kr_jax.main "$@"
