#!/usr/bin/env bash
# What runs on a host of a TPU slice; launch/tpu.sh copies it to ~/kr_jax and calls it there:
#   host.sh setup EXTRAS       unpacks project.tar.gz, finds a Python, installs kr_jax[EXTRAS]; does nothing twice
#   host.sh check DEVICES      whether JAX sees DEVICES here
#   host.sh run FLAGS          starts python -m kr_jax.main FLAGS, which outlives the connection
#   host.sh status             state, exit status, when it ended, whether stopped, id, progress
#   host.sh follow ID FROM CALL    the log of run ID from byte FROM on, until the run ends; once for each CALL
#   host.sh tail LINES         the end of the log
#   host.sh stop MARK GRACE    SIGTERM, so that the run saves; SIGKILL after GRACE seconds. MARK: -, or by-hand
# In ~/kr_jax: project/, run.log, run.exit (its exit status), run.id, run.pid, supervisor.pid, host.env (variables).
# shellcheck disable=SC2329  # functions are called by name
set -euo pipefail
home="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
project="$home/project"
cd "$home"

die() { echo "error: $*"; exit 1; }

# A run.


is_running() {
  local pid
  pid="$(cat supervisor.pid 2>/dev/null)" || return 1
  [ ! -e run.exit ] && kill -0 "$pid" 2>/dev/null && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q host.sh
}

run() {
  local words=() word
  if is_running; then die "run $(cat run.id) is going already"; fi
  [ -x "$project/.venv/bin/python" ] || die "there is no $project/.venv; launch/tpu.sh setup makes it"
  for word in "$@"; do # of this machine, not of the one that tpu.sh runs on
    case "$word" in --workdir='~/'*) word="--workdir=$HOME/${word#*\~/}" ;; esac
    words+=("$word")
  done
  rm -f run.exit run.pid run.stopped follow.*
  date -u +%Y%m%dT%H%M%SZ-$$ >run.id
  : >run.log
  setsid nohup bash "$home/host.sh" supervise "${words[@]}" >>run.log 2>&1 </dev/null &
  echo $! >supervisor.pid
  # Until it has a session of its own, the end of this connection would be its end too.
  while [ ! -s run.pid ]; do
    kill -0 $! 2>/dev/null || die "the run did not start: $(tail -n 5 run.log)"
    sleep 0.1
  done
  echo "run $(cat run.id) is started"
}

supervise() {
  local code=0
  echo $$ >supervisor.pid
  # It stays to write how the run ended; a signal to all processes of the machine reaches the run as well.
  trap : TERM HUP INT
  variables
  cd "$project"
  echo "host.sh: python -m kr_jax.main $*"
  PYTHONUNBUFFERED=1 PYTHONPATH="$project" bash -c 'echo $$ > "$0"; exec "$@"' "$home/run.pid" \
    .venv/bin/python -m kr_jax.main "$@" || code=$?
  echo "$code" >"$home/run.exit.new"
  mv "$home/run.exit.new" "$home/run.exit"
}

# What tpu.sh's --pass gave.
variables() {
  # shellcheck source=/dev/null
  if [ -e host.env ]; then . ./host.env; fi
}

status() {
  local state=none code=- ended=- stopped=no progress
  if [ -e run.exit ]; then
    state=ended code="$(cat run.exit)" ended="$(date -r run.exit +%s.%N)"
  elif is_running; then
    state=running
  elif [ -e run.id ]; then
    state=lost # the machine started anew, or the run was killed with its supervisor
  fi
  if [ -e run.stopped ]; then stopped=yes; fi
  # The last line of a progress bar, such as 'train: 12 of 120 steps, ...'.
  progress="$(grep -o '^[a-z_ ]*: [0-9]* of [0-9]* steps.*' run.log 2>/dev/null | tail -n 1)" || true
  echo "$state $code $ended $stopped $(cat run.id 2>/dev/null || echo -) $progress"
}

follow() { # ID FROM CALL
  [ "$(cat run.id 2>/dev/null)" = "$1" ] || die "another run has begun since: $(cat run.id 2>/dev/null)"
  # gcloud tries a connection that broke again by itself, and would get the same bytes twice; 254 has tpu.sh ask anew.
  [ ! -e "follow.$3" ] || exit 254
  : >"follow.$3"
  exec tail --pid="$(cat supervisor.pid)" -c "+$(($2 + 1))" -f run.log
}

stop() { # MARK GRACE
  local pid waited=0
  if ! is_running; then echo "no run is going"; return; fi
  if [ "$1" != - ]; then touch run.stopped; fi
  pid="$(cat run.pid)"
  echo "SIGTERM to run $(cat run.id); it saves and ends"
  kill -TERM "$pid" 2>/dev/null || true
  while is_running; do
    if ((waited >= ${2:-600})); then
      echo "it has not ended in $waited seconds, and is killed; its last checkpoint stays"
      kill -KILL "$pid" 2>/dev/null || true
      sleep 1
      return
    fi
    sleep 1
    waited=$((waited + 1))
  done
  echo "it has ended with $(cat run.exit)"
}

# Setup.


setup() { # EXTRAS
  local python
  if is_running; then die "run $(cat run.id) is going; launch/tpu.sh stop ends it"; fi
  [ ! -e host.env ] || chmod 600 host.env
  unpack
  if [ -x "$project/.venv/bin/python" ] && ! "$project/.venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$project/.venv" # of an interpreter that is gone
  fi
  if [ ! -x "$project/.venv/bin/python" ]; then
    python="$(find_python)" || die "no Python of 3.11 or newer, and none could be had: see above"
    echo "python: $python ($("$python" --version))"
    PYTHON="$python" "$project/launch/environment.sh" "$1"
  else
    "$project/launch/environment.sh" "$1"
  fi
  echo "setup: done"
}

# The project; what is not of it (.venv, data, checkpoints) stays, and files that a commit dropped go.
unpack() {
  mkdir -p "$project"
  if [ -e files.txt ]; then (cd "$project" && tr '\n' '\0' <../files.txt | xargs -0 rm -f --); fi
  tar -tzf project.tar.gz | grep -v '/$' >files.txt
  tar -xzf project.tar.gz -C "$project"
}

# Prints an interpreter of 3.11 or newer that can make environments; brings one where there is none.
find_python() {
  local name
  for name in python3.12 python3.13 python3.11; do
    if can_make_environments "$name"; then command -v "$name"; return; fi
  done
  echo "there is no Python of 3.11 to 3.13 with venv here; uv brings one" >&2
  python_of_uv && return
  echo "uv brought none; trying the packages of ppa:deadsnakes" >&2
  python_of_deadsnakes
}

can_make_environments() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

python_of_uv() {
  local uv
  PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"
  if ! command -v uv >/dev/null; then
    python3 -m pip install --user --quiet uv >&2 || curl -LsSf https://astral.sh/uv/install.sh | sh >&2 || return 1
  fi
  uv="$(command -v uv)" || return 1
  "$uv" python install 3.12 >&2 && "$uv" python find 3.12
}

python_of_deadsnakes() {
  local apt=(sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq)
  sudo add-apt-repository -y ppa:deadsnakes/ppa >&2 && "${apt[@]}" update >&2 &&
    "${apt[@]}" install -y python3.12 python3.12-venv >&2 && command -v python3.12
}

# JAX_PLATFORMS, where it is set, is what is expected instead of TPUs.
check() { # DEVICES
  if is_running; then die "run $(cat run.id) is going, and holds the devices"; fi
  variables
  timeout 300 "$project/.venv/bin/python" - "$1" <<'END'
import os
import sys

import jax

wanted, platform = int(sys.argv[1]), os.environ.get('JAX_PLATFORMS') or 'tpu'
try:
  found = [device.platform for device in jax.local_devices()]
except RuntimeError as error:
  sys.exit(f'error: JAX sees no devices: {error}')
if found != [platform] * wanted:
  sys.exit(f'error: this host should have {wanted} devices of {platform}; JAX sees {len(found)} of {set(found)}')
print(f'jax {jax.__version__}: {wanted} devices of {platform} here, {jax.device_count()} in all')
print(f'process: {jax.process_index()}')
END
}

{ # read as a whole, so that a new copy of this file does no harm to one that runs
  case "${1:-}" in
    setup | check | run | supervise | status | follow | stop) "$@" ;;
    tail) tail -n "$2" run.log ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$home/host.sh"; exit 2 ;;
  esac
  exit
}
