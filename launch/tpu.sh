#!/usr/bin/env bash
# Trains on Cloud TPUs: creates a slice, sets up its hosts, runs on all of them, and starts again after preemptions.
#
#   launch/tpu.sh VERB [FLAGS] [-- FLAGS OF kr_jax.main]
#
#   up       create, setup, run and follow; --keep: again after each preemption, until the run is complete
#   create   the slice; waits until it is ready        setup   the project at its commit, Python, JAX; a check of chips
#   run      starts the run on all hosts; follows it   logs    follows it (again); the log of --host=N
#   status   of the slice and of each host's run       ssh     a shell on --host=N; or: ssh -- COMMAND
#   stop     the run saves and ends                    delete  all that create made
#
#   --type=v5e:4x4       chip and topology, as preflight has them; v4, v5e, v5p, v6e, tpu7x
#   --zone=us-west4-a    --any-zone takes one that this script does not know
#   --spot, --flex-start, --on-demand      how it is paid for
#   --config=configs/qwen3_4b.py           a config of this checkout, or kr_jax:NAME
#   --bucket=gs://BUCKET/DIR               the run is in gs://BUCKET/DIR/NAME; or say --workdir=
#   --name=kr-jax        of the slice and the run. Later verbs need it alone: the rest is remembered
#   --project=PROJECT    gcloud's own unless set
#   --env=FILE           these settings as lines NAME=VALUE; flags win
#   --dry-run            prints the commands, runs none
#   --keep  --tries=20 (in a row without a new step)  --backoff-max=10m
#   --wait=6h            for the slice      --max-run=4h     Google deletes the slice then (--flex-start: 7d unless set)
#   --detach             run: does not follow        --delete-after  up: deletes the slice when the run is complete
#   --host=0             logs, ssh                    --yes           delete: does not ask
#   --pass=HF_TOKEN,WANDB_API_KEY          variables of this shell that the run gets
#   --extras=tpu         of setup.cfg; tpu,wandb for Weights & Biases
#   --disk=100 (GB)  --network=  --subnetwork=
#
# An environment file, for --env=spot.env:
#   project=my-project
#   zone=us-west4-a
#   type=v5e:4x4
#   provisioning=spot
#   bucket=gs://my-bucket/runs
#   config=configs/qwen3_4b.py
#
#   launch/tpu.sh up --env=spot.env --keep -- --config.seed=1
#
# Exit status: of the run (0 complete, 75 start me again); 1 where something failed; 2 for wrong flags.
# On this machine runs/tpu/NAME holds logs/ (a log a host), keep.log and what is remembered.
# shellcheck disable=SC2034,SC2154,SC2329  # launch/tpu/*.sh has the same variables; verbs are called by name
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for part in chips calls compute_engine queued_resources hosts slice; do
  # shellcheck source=/dev/null
  . "$root/launch/tpu/$part.sh"
done

settings="name project zone type provisioning bucket config workdir tries backoff_max wait max_run host"
settings="$settings pass extras disk network subnetwork"
switches="any_zone keep dry_run detach delete_after yes"
name='' project='' zone='' type='' provisioning='' bucket='' config='' workdir='' tries='' backoff_max='' wait=''
max_run='' host='' pass='' extras='' disk='' network='' subnetwork='' env=''
any_zone='' keep='' dry_run='' detach='' delete_after='' yes=''
rest=() run_flags=() host_names=() host_ips=() host_states=() loud='' terminal=''
lost_what='' failure='' was_there='' had_slice='' last_step=-1

main() {
  local verb="${1:-}"
  case "$verb" in
    up | create | setup | run | logs | status | ssh | stop | delete) ;;
    '' | -h | --help | help)
      sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      return ;;
    *) die "'$verb' is none of up, create, setup, run, logs, status, ssh, stop, delete; launch/tpu.sh -h explains" ;;
  esac
  read_flags "${@:2}"
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"; kill $(jobs -p) 2>/dev/null || true' EXIT
  fill_settings
  [ -n "$dry_run" ] || mkdir -p "$logs"
  "verb_$verb"
}

verb_up() {
  check_slice
  read_run
  [ -z "$keep" ] || [ -z "$detach" ] || die "--keep watches from this machine, --detach does not: take one of them"
  if [ -n "$keep" ]; then
    keep_run || return
  else
    begin_run || return 1
    [ -z "$detach" ] || { say_detached; return; }
    follow_run || return 1
    [ "$outcome" = complete ] || { remind; return "$code"; }
  fi
  if [ -n "$delete_after" ]; then delete_slice; else remind; fi
}

verb_create() { check_slice; create_slice; }

verb_setup() { setup_hosts; }

verb_run() {
  read_run
  run_hosts || return 1
  [ -z "$detach" ] || { say_detached; return; }
  follow_run || return 1
  remind
  return "$code"
}

verb_logs() {
  find_hosts || return 1
  ((host < hosts)) || die "--host=$host: $name has hosts 0 to $((hosts - 1))"
  survey
  if [ -n "$dry_run" ]; then "${api}_ssh" "$host" 'bash kr_jax/host.sh follow ID 0 CALL'; return; fi
  [ "${host_states[$host]}" != none ] || die "nothing has run on $name yet; launch/tpu.sh run starts a run"
  [ "${host_states[$host]}" != silent ] || { say "error: host $host does not answer; see tpu.sh status"; return 1; }
  stream_log "$host" "${host_ids[$host]}"
}

verb_status() {
  local found i
  found="$("${api}_state")"
  [ -z "$dry_run" ] || found=READY
  echo "$name: $type, ${provisioning:-provisioning unknown}, in $zone: $found"
  [ "$found" = READY ] || return 0
  find_hosts || return 1
  survey
  [ -z "$dry_run" ] || return 0
  for ((i = 0; i < hosts; i++)); do
    case "${host_states[i]}" in
      none) found="set up or not, nothing has run" ;;
      running) found="runs since ${host_ids[i]%-*}: ${host_progress[i]:-no step yet}" ;;
      ended) found="left with ${host_codes[i]}: ${host_progress[i]:-no step}" ;;
      lost) found="its run is gone, the machine started anew: ${host_progress[i]:-no step}" ;;
      *) found="does not answer" ;;
    esac
    echo "host $i ${host_names[i]} ${host_ips[i]}: $found"
  done
}

verb_ssh() {
  find_hosts || return 1
  ((host < hosts)) || die "--host=$host: $name has hosts 0 to $((hosts - 1))"
  if [ "${#rest[@]}" = 0 ]; then
    terminal=yes "${api}_login" "$host"
  else
    loud=yes "${api}_ssh" "$host" "$(quote "${rest[@]}")"
  fi
}

verb_stop() {
  find_hosts || return 1
  say "SIGTERM to the run on $hosts host$(plural); it finishes its step and saves (10 minutes at most)"
  stop_mark=by-hand stop_grace=600
  each_host stop_host || return 1
  [ -n "$dry_run" ] || tail -qn 1 "$logs"/stop_host-*.log
}

verb_delete() {
  local answer
  if [ -z "$yes$dry_run" ]; then
    printf 'Delete %s (%s in %s of %s)? ' "$name" "$type" "$zone" "$project" >&2
    printf 'What is on its disks alone is lost. [y/N] ' >&2
    read -r answer || answer=''
    case "$answer" in y | Y | yes) ;; *) die "nothing is deleted; --yes does not ask" ;; esac
  fi
  delete_slice
}

remind() { say "$name is still there and is paid for: launch/tpu.sh delete --name=$name"; }

say_detached() { say "the run goes on by itself: launch/tpu.sh logs, status, stop, delete --name=$name"; }

# Flags and settings.

read_flags() {
  local flag value given=()
  while (($#)); do
    flag="$1"
    shift
    case "$flag" in
      --) rest=("$@"); break ;;
      --spot | --flex-start | --on-demand) given+=("provisioning=${flag#--}") ;;
      --env=*) env="${flag#*=}" ;;
      --*=*) given+=("${flag#--}") ;;
      --env | --name | --project | --zone | --type | --bucket | --config | --workdir | --host)
        (($#)) || die "$flag needs a value"
        if [ "$flag" = --env ]; then env="$1"; else given+=("${flag#--}=$1"); fi
        shift ;;
      --*) set_switch "$flag" ;;
      *) die "'$flag': flags begin with --, and those of kr_jax.main stand behind --" ;;
    esac
  done
  if [ -n "$env" ]; then
    [ -r "$env" ] || die "--env=$env: there is no such file"
    read_settings "$env"
  fi
  for value in ${given[@]+"${given[@]}"}; do set_setting "${value%%=*}" "${value#*=}" "--${value%%=*}"; done
}

set_switch() {
  local switch="${1#--}"
  switch="${switch//-/_}"
  is_in "$switch" "$switches" || die "$1 is no flag; launch/tpu.sh -h names them"
  printf -v "$switch" yes
}

set_setting() { # NAME VALUE WHERE
  local setting="${1//-/_}"
  is_in "$setting" "$settings" || die "$3 is no setting; launch/tpu.sh -h names them"
  printf -v "$setting" %s "$2"
}

# Lines NAME=VALUE; nothing of them is executed.
read_settings() { # FILE
  local line value
  while IFS= read -r line || [ -n "$line" ]; do
    line="${line#"${line%%[![:space:]]*}"}" line="${line%"${line##*[![:space:]]}"}"
    case "$line" in '' | '#'*) continue ;; *=*) ;; *) die "$1: '$line' is not NAME=VALUE" ;; esac
    value="${line#*=}" value="${value%\"}" value="${value#\"}"
    set_setting "$(tr '[:upper:]' '[:lower:]' <<<"${line%%=*}")" "$value" "$1: ${line%%=*}"
  done <"$1"
}

fill_settings() {
  local given setting
  given="$(for setting in $settings; do [ -z "${!setting}" ] || echo "$setting=${!setting}"; done)"
  name="${name:-kr-jax}" state="$root/runs/tpu/${name:-kr-jax}"
  logs="$state/logs"
  if [ -r "$state/settings" ]; then # what was remembered, and above it what is given now
    read_settings "$state/settings"
    while IFS= read -r setting; do
      [ -z "$setting" ] || printf -v "${setting%%=*}" %s "${setting#*=}"
    done <<<"$given"
    # A bucket that is given now is heeded before a workdir that was remembered.
    case $'\n'"$given" in *$'\nworkdir='*) ;; *$'\nbucket='*) workdir='' ;; esac
  fi
  case "$name" in *[!a-z0-9-]* | [!a-z]* | *-) die "--name=$name: small letters, digits and -, a letter first" ;; esac
  if [ -z "$dry_run" ]; then
    command -v gcloud >/dev/null || die "gcloud is not here: https://cloud.google.com/sdk/docs/install," \
      "then gcloud auth login"
    [ -n "$project" ] || project="$(call gcloud config get project)" || true
  fi
  [ -n "$project" ] || die "say --project=PROJECT, or: gcloud config set project PROJECT"
  [ -n "$type" ] || die "say --type=CHIP:TOPOLOGY, as --type=v5e:4x4 (nothing is remembered of $name)"
  read_type
  [ -n "$zone" ] || die "say where: --zone=ZONE; $chip is in $(zones_of "$chip")"
  region="${zone%-*}" extras="${extras:-tpu}" disk="${disk:-100}"
  wait="${wait:-6h}" tries="${tries:-20}" host="${host:-0}"
  case "$tries$host$disk" in *[!0-9]*) die "--tries=$tries --host=$host --disk=$disk: whole numbers" ;; esac
  wait_s="$(seconds_of --wait "$wait")"
  backoff_max="$(seconds_of --backoff-max "${backoff_max:-10m}")"
  poll=$((20 + 2 * hosts))
}

# The flags of kr_jax.main: --config, --workdir, and what stands behind --.
read_run() {
  local file
  [ -n "$config" ] || die "say what to train: --config=configs/qwen3_4b.py"
  config="${config#"$root/"}" file="${config%%:*}"
  case "$config" in
    kr_jax:*) ;;
    *)
      [ -e "$root/$file" ] || die "--config=$config: there is no $root/$file"
      if git -C "$root" rev-parse -q HEAD >/dev/null 2>&1; then
        git -C "$root" cat-file -e "HEAD:./$file" 2>/dev/null ||
          die "--config=$config: $file is not committed, and the hosts get the commit"
      fi ;;
  esac
  if [ -n "$bucket" ]; then
    case "$bucket" in gs://?*) ;; *) die "--bucket=$bucket: write gs://BUCKET/DIRECTORY" ;; esac
    workdir="${workdir:-${bucket%/}/$name}"
  fi
  if [ -z "$workdir" ]; then
    ((hosts == 1)) || die "$hosts hosts need a place that all see: --bucket=gs://BUCKET/DIRECTORY"
    [ -z "$keep" ] || die "--keep needs a place that outlives the slice: --bucket=gs://BUCKET/DIRECTORY"
    # shellcheck disable=SC2088  # host.sh makes it the host's
    workdir="~/kr_jax/runs/$name"
    say "warning: without --bucket the run is on the host's disk alone, which goes with the slice"
  fi
  run_flags=("--config=$config" "--workdir=$workdir" ${rest[@]+"${rest[@]}"})
}

{ main "$@"; exit; } # read as a whole, so that a change of this file while it runs does no harm
