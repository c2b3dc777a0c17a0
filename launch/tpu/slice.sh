# shellcheck shell=bash disable=SC2034,SC2154  # its variables are those of tpu.sh
# A slice as a whole: create, wait, delete, and keep a run alive through preemptions. Sourced by tpu.sh.
# Where something fails, `failure` says what: stockout, quota, refused, passing, lost, timeout, unreachable, setup, run,
# running or unknown.

# Creates the slice and waits until it is ready; goes on where it is there already.
create_slice() {
  local found
  failure='' was_there='' host_names=() host_ips=()
  check_remembered
  remember
  found="$("${api}_state")"
  [ -z "$dry_run" ] || found=NONE
  case "$found" in
    READY)
      was_there=yes
      say "$name is there already, and ready"
      return 0 ;;
    WAITING*) say "$name is there already" ;;
    NONE)
      say "creating $name: $type ($hosts host$(plural), $chips chips) in $zone, $provisioning"
      if ! "${api}_create"; then
        failure="$(reason)"
        [ "$failure" = exists ] || { explain "error: $name could not be created:"; return 1; }
        failure=''
      fi ;;
    UNKNOWN) failure="$(reason)"; explain "error: Google Cloud does not say what $name is:"; return 1 ;;
    *)
      failure=lost
      say "error: $name is there, but ${found#* }; first: launch/tpu.sh delete --name=$name"
      return 1 ;;
  esac
  wait_ready
}

# Waits until all hosts run; says what it waits for, once for each change.
wait_ready() {
  local waited=0 found said=''
  for ((;;)); do
    found="$("${api}_state")"
    if [ -n "$dry_run" ]; then echo "# ... again every 15 s, at most $wait, until it is ready" >&3; return 0; fi
    case "$found" in
      READY) say "$name is ready"; return 0 ;;
      FAILED*) failure=quota; explain "error: $name is refused:"; return 1 ;;
      LOST*) failure=lost; say "error: ${found#LOST }"; return 1 ;;
      # What was just created may not be listed yet, and an answer may fail to come.
      NONE) if ((waited >= 300)); then failure=lost; say "error: $name is gone"; return 1; fi ;;
      WAITING*) [ "$found" = "$said" ] || say "$(date +%H:%M:%S) waiting: ${found#WAITING }" ;;
    esac
    said="$found"
    if ((waited >= wait_s)); then
      failure=timeout
      say "error: $name is not ready after $wait; it stays asked for: create waits again (--wait=2d), delete ends it"
      return 1
    fi
    snooze 15
    waited=$((waited + 15))
  done
}

# What `create` was told stands in $state/settings, so that other verbs need --name alone.
remember() {
  local setting
  [ -z "$dry_run" ] || return 0
  for setting in project zone type provisioning bucket config workdir; do
    [ -z "${!setting}" ] || printf '%s=%s\n' "$setting" "${!setting}"
  done >"$state/settings"
}

check_remembered() {
  local before
  before="$(sed -n 's/^type=//p' "$state/settings" 2>/dev/null)" || true
  if [ -n "$before" ] && [ "$before" != "$type" ] && [ "$("${api}_state")" != NONE ]; then
    die "$name was created as $before, not as $type: delete it first, or take another --name"
  fi
}

# Deletes one thing; that it is not there is no error.
drop() {
  if gcp "$@"; then return 0; fi
  if [ "$(reason)" = missing ]; then return 0; fi
  explain "error: not deleted:"
  return 1
}

delete_slice() {
  "${api}_delete" || return 1
  [ -n "$dry_run" ] || { rm -f "$state/settings" "$state/order"; say "$name is deleted; its logs stay in $state"; }
}

# Creates, sets up and runs; where a run is going already, leaves it to be followed.
begin_run() {
  create_slice || return 1
  had_slice=yes
  if [ -n "$was_there" ] && run_is_going; then
    note "a run is going on $name already, and is followed"
  else
    setup_hosts && run_hosts
  fi
}

# Begins a run and follows it; after a preemption, a stock-out or a run that wants to be started again, once more.
keep_run() {
  local try=1 pause=30 best=-1 setups=0
  for ((;;)); do
    note "try $try of $tries in a row without a new step"
    outcome='' failure=''
    follow_one || true
    case "$outcome $failure" in
      complete*) return 0 ;;
      stopped*) return 75 ;;
      failed*) return "$code" ;;
      *' setup')
        setups=$((setups + 1))
        if ((setups >= 2)) && slice_is_ready; then note "given up: the setup failed twice"; return 1; fi ;;
      # What was had before is had again, some time.
      *' quota' | *' refused' | *' unknown')
        if [ -z "$had_slice" ]; then note "given up: a new try does not mend this"; return 1; fi ;;
    esac
    # Tries are those in a row that brought no new step.
    if ((last_step > best)); then best=$last_step try=0 pause=30 setups=0; fi
    try=$((try + 1))
    if ((try > tries)); then note "given up after $tries tries in a row without a new step"; return 75; fi
    note "again in $pause s (${outcome:-$failure}, last step seen: $last_step)"
    snooze "$pause"
    pause=$((pause * 2 > backoff_max ? backoff_max : pause * 2))
    clear_slice
  done
}

follow_one() {
  if ! begin_run || ! follow_run; then return 1; fi
  # A run that fails while its machines go is not to blame.
  if [ "$outcome" = failed ] && ! slice_is_ready; then
    outcome=lost
    note "the slice went at the same time"
  fi
}

slice_is_ready() { [ "$("${api}_state")" = READY ]; }

# Deletes what is left of a slice, unless all of it is there.
clear_slice() {
  case "$("${api}_state")" in
    READY) note "$name is still there, and used again" ;;
    NONE) note "$name is gone" ;;
    *) note "deleting what is left of $name"; delete_slice || true ;;
  esac
}
