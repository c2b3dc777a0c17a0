# shellcheck shell=bash disable=SC2034,SC2154  # its variables are those of tpu.sh
# What is done on all hosts of a slice at once: setup, run, status, stop, and following a run. Sourced by tpu.sh.

# Fills host_names and host_ips, in the order of the processes; once for a slice.
find_hosts() {
  local lines machine_name address
  [ "${#host_names[@]}" = 0 ] || return 0
  if ! lines="$("${api}_hosts" | in_order)"; then explain "error: the hosts of $name are not known:"; return 1; fi
  if [ -n "$dry_run" ]; then
    say "# the line above names the hosts; here they are called as below"
    lines="$(for ((i = 0; i < hosts; i++)); do echo "$name-$i IP_OF_HOST_$i"; done)"
    if [ "$api $hosts" = 'compute 1' ]; then lines="$name IP_OF_HOST_0"; fi
  fi
  while read -r machine_name address; do
    [ -z "$machine_name" ] || { host_names+=("$machine_name"); host_ips+=("$address"); }
  done <<<"$lines"
  if [ "${#host_names[@]}" != "$hosts" ]; then
    say "error: $name has ${#host_names[@]} hosts, and $type has $hosts; see launch/tpu.sh status --name=$name"
    host_names=() host_ips=()
    return 1
  fi
}

# Hosts by the numbers that JAX gives them, which `setup_hosts` asked for; as they come where these are not known.
in_order() {
  local machine_name address number
  while read -r machine_name address; do
    number="$(awk -v name="$machine_name" '$1 == name { print $2 }' "$state/order" 2>/dev/null)" || true
    echo "${number:-9999} $machine_name $address"
  done | sort -n -s | cut -d ' ' -f 2-
}

# Runs FUNCTION HOST for all hosts at once, each with a log of its own; says which failed, and how.
each_host() { # FUNCTION
  local i pids=() failed=''
  if [ -n "$dry_run" ]; then
    for ((i = 0; i < hosts; i++)); do "$1" "$i"; done
    return 0
  fi
  for ((i = 0; i < hosts; i++)); do
    (loud=yes; "$1" "$i") >"$logs/$1-$i.log" 2>&1 &
    pids[i]=$!
  done
  for ((i = 0; i < hosts; i++)); do wait "${pids[i]}" || failed="$failed $i"; done
  for i in $failed; do
    say "error: host $i (${host_names[i]}) failed; the end of $logs/$1-$i.log:"
    tail -n 8 "$logs/$1-$i.log" | sed 's/^/  | /' >&2
  done
  [ -z "$failed" ]
}

# Runs a command on a host, again where the connection broke (255, as ssh says it): for what may be done twice.
on_host() { # HOST COMMAND
  local try status
  for try in 1 2 3; do
    status=0
    "${api}_ssh" "$1" "$2" || status=$?
    if [ "$status" != 255 ] || [ "$try" = 3 ]; then return "$status"; fi
    echo "the connection broke; again"
    snooze 10
  done
}

reach_host() { # a new machine takes a while until it answers
  local try began=$SECONDS
  # Ten minutes: gcloud itself may try for three before it says no.
  for ((try = 1; try <= 20 && SECONDS - began < 600; try++)); do
    if "${api}_ssh" "$1" true; then return 0; fi
    snooze 15
  done
  echo "no answer by ssh; does the network allow port 22 from here?"
  return 1
}

setup_host() { "${api}_copy" "$state/kr_jax" "$1" && on_host "$1" "bash kr_jax/host.sh setup $extras 2>&1"; }

check_host() { on_host "$1" "bash kr_jax/host.sh check $devices_per_host 2>&1"; }

start_host() {
  local id status=0 flags=("${run_flags[@]}")
  if ((hosts > 1)); then
    flags+=("--coordinator=${host_ips[0]}:8476" "--processes=$hosts" "--process=$1")
  fi
  "${api}_ssh" "$1" "$(quote bash kr_jax/host.sh run "${flags[@]}") 2>&1" || status=$?
  # The run may have started although the connection broke: there is a new one then. gcloud may have tried it again by
  # itself, and been told that a run is going.
  if [ "$status" != 0 ]; then
    id="$(on_host "$1" 'bash kr_jax/host.sh status' | awk '/^running |^ended / { print $5 }')" || true
    [ -z "$id" ] || [ "$id" = "${host_ids[$1]}" ] || status=0
  fi
  return "$status"
}

status_host() { "${api}_ssh" "$1" 'bash kr_jax/host.sh status'; }

stop_host() { on_host "$1" "bash kr_jax/host.sh stop $stop_mark $stop_grace 2>&1"; }

# Puts what a host gets into $state/kr_jax: host.sh, the project at its commit, and the environment of the run.
pack() {
  local into="$state/kr_jax" commit changed variable
  for variable in ${pass//,/ }; do
    [ -n "${!variable-}" ] || die "--pass=$pass: $variable is not set in this shell"
  done
  call rm -rf "$into"
  call mkdir -p "$into"
  call cp "$root/launch/host.sh" "$into"
  if commit="$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null)"; then
    call git -C "$root" archive --format=tar.gz --output="$into/project.tar.gz" HEAD
    changed="$(git -C "$root" status --porcelain | head -n 5)"
    say "the hosts get commit $commit of $root"
    [ -z "$changed" ] || say "warning: what is not committed stays behind:" $'\n'"$changed"
  else
    say "the hosts get $root as it is, which is no git checkout"
    call tar -czf "$into/project.tar.gz" -C "$root" --exclude=./.venv --exclude=./runs --exclude=./data \
      --exclude=./checkpoints .
  fi
  [ -z "$dry_run" ] || { [ -z "$pass" ] || echo "# $into/host.env: the values of $pass" >&3; return 0; }
  (umask 077; : >"$into/host.env")
  for variable in ${pass//,/ }; do
    printf 'export %s=%q\n' "$variable" "${!variable}" >>"$into/host.env"
  done
}

setup_hosts() {
  failure=unreachable
  find_hosts || return 1
  reach_hosts || return 1
  failure=setup
  pack || return 1
  say "setup of $hosts host$(plural), some minutes the first time (logs: $logs/setup_host-*.log)"
  each_host setup_host || return 1
  rm -f "$state/kr_jax/host.env"
  # All at once: JAX waits for the other hosts of a slice before it shows its devices.
  each_host check_host || return 1
  [ -n "$dry_run" ] || sort_hosts || return 1
  say "setup is done: $devices_per_host devices on each of $hosts host$(plural)"
  failure=''
}

# The first host alone: gcloud may have to make its ssh key first.
reach_hosts() {
  local all=$hosts
  hosts=1
  if ! each_host reach_host; then hosts=$all; return 1; fi
  hosts=$all
  ((hosts == 1)) || each_host reach_host
}

# On TPUs JAX numbers processes by the place of their host in the slice, whatever --process says, and its first one
# writes the record and the progress: that is to be host 0, whose log is followed.
sort_hosts() {
  local i
  for ((i = 0; i < hosts; i++)); do
    sed -n "s/^process: /${host_names[i]} /p" "$logs/check_host-$i.log" | tail -n 1
  done >"$state/order"
  host_names=() host_ips=()
  find_hosts
}

# Starts the run on all hosts. It outlives this machine and its connection.
run_hosts() {
  failure=run
  if run_is_going; then
    failure=running
    say "error: a run is going already: launch/tpu.sh logs --name=$name shows it, launch/tpu.sh stop ends it"
    return 1
  fi
  rm -f "$logs"/run-*.log
  say "python -m kr_jax.main ${run_flags[*]}, on $hosts host$(plural)"
  if ! each_host start_host; then
    stop_mark=- stop_grace=30
    each_host stop_host || true
    return 1
  fi
  failure=''
}

run_is_going() { find_hosts && survey && is_in running "${host_states[*]}"; }

# Asks all hosts; fills host_states (none, running, ended, lost, silent), host_codes, host_ends (a date), host_ids,
# host_stopped (yes: by `stop`), host_progress, and last_step, the highest step that any of them tells.
survey() {
  local i step
  host_states=() host_codes=() host_ends=() host_ids=() host_stopped=() host_progress=()
  # silent hosts are told by their states
  each_host status_host 2>/dev/null || true
  for ((i = 0; i < hosts; i++)); do
    [ -z "$dry_run" ] || { host_states[i]=none; continue; }
    read -r "host_states[i]" "host_codes[i]" "host_ends[i]" "host_stopped[i]" "host_ids[i]" "host_progress[i]" < <(
      grep '^none \|^running \|^ended \|^lost ' "$logs/status_host-$i.log" || echo silent - - - -)
    step="$(sed -n '/^warm start/d; s/.*: \([0-9]*\) of .*/\1/p' <<<"${host_progress[i]}")"
    if [ -n "$step" ] && ((step > last_step)); then last_step=$step; fi
  done
}

# Shows the log of a host's run as it grows, and keeps a copy, so that a broken connection goes on where it was.
stream_log() { # HOST ID
  local copy="$logs/run-$1-$2.log" from status
  touch "$copy"
  tail -n 100 "$copy"
  for ((;;)); do
    from=$(($(wc -c <"$copy"))) status=0
    "${api}_ssh" "$1" "bash kr_jax/host.sh follow $2 $from $(date +%s)-$RANDOM" | tee -a "$copy" || status=$?
    case "$status" in 254 | 255) ;; *) return "$status" ;; esac
    say "the connection to host $1 broke; the run goes on, and its log as soon as it can be read"
    snooze 10
  done
}

# Follows the run until it has ended on all hosts, and ends it on all where it failed on one.
# Sets outcome (complete, stopped, failed, again, lost) and code, which the run left with.
follow_run() {
  local stream waited=0 quiet=0 first
  find_hosts || return 1
  survey
  if [ -n "$dry_run" ]; then
    "${api}_ssh" "$host" "bash kr_jax/host.sh follow ID 0 CALL"
    outcome=complete code=0
    return
  fi
  outcome='' code=1 lost_what=''
  set -m # a process group of its own, so that it can be ended with what it started
  stream_log "$host" "${host_ids[$host]}" </dev/null &
  stream=$!
  set +m
  trap 'kill -- "-$stream" 2>/dev/null; say_detached; exit 130' INT
  while [ -z "$outcome" ]; do
    judge
    [ -z "$outcome" ] || break
    first="$(first_failure)"
    if [ -n "$first" ] && ((waited >= 60)); then
      say "host $first left with ${host_codes[$first]}; the others are stopped"
      stop_mark=- stop_grace=60
      each_host stop_host || true
    elif [ -n "$first" ]; then
      waited=$((waited + poll)) # JAX ends the others by itself, mostly
    fi
    if is_in silent "${host_states[*]}" || is_in lost "${host_states[*]}"; then quiet=$((quiet + 1)); else quiet=0; fi
    if ((quiet > 0)); then look_for_slice $quiet; fi
    [ -z "$outcome" ] || break
    snooze "$poll"
    survey
  done
  end_stream "$stream"
  trap - INT
  tell_outcome
}

# The host whose run failed first, if any did.
first_failure() {
  local i
  for ((i = 0; i < hosts; i++)); do
    case "${host_states[i]} ${host_codes[i]}" in
      'ended 0') ;;
      ended*) echo "${host_ends[i]} $i" ;;
    esac
  done | sort -n | awk 'NR == 1 { print $2 }'
}

# Sets outcome and code where the run has ended on all hosts.
judge() {
  local i first
  for ((i = 0; i < hosts; i++)); do [ "${host_states[i]}" = ended ] || return 0; done
  first="$(first_failure)"
  if is_in yes "${host_stopped[*]}"; then
    outcome=stopped code="${host_codes[${first:-0}]}"
  elif [ -z "$first" ]; then
    outcome=complete code=0
  else
    code="${host_codes[$first]}" outcome=failed
    # 75: start me again. Above 128: killed, by the machine's end or for want of memory.
    if [ "$code" = 75 ] || ((code > 130)) || ((code == 129)); then outcome=again; fi
  fi
}

# Hosts are silent: is the slice there still?
look_for_slice() { # HOW_OFTEN_ALREADY
  local found
  found="$("${api}_state")"
  case "$found" in
    UNKNOWN) say "$(date +%H:%M:%S) neither the hosts nor Google Cloud answer; is this machine online?" ;;
    READY)
      if is_in lost "${host_states[*]}"; then
        outcome=again code=75 lost_what="a host started anew, and its run is gone"
      elif (($1 >= 10)); then
        outcome=lost code=75 lost_what="hosts do not answer"
      fi ;;
    NONE | WAITING*) outcome=lost code=75 lost_what="hosts of the slice are gone" ;;
    *) outcome=lost code=75 lost_what="${found#* }" ;;
  esac
}

# The rest of the log is waited for, but not for one whose host is gone.
end_stream() { # PID
  local waited=0
  while [ "$outcome" != lost ] && ((waited < 300)) && kill -0 "$1" 2>/dev/null; do
    snooze 2
    waited=$((waited + 2))
  done
  kill -- "-$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

tell_outcome() {
  local first
  first="$(first_failure)"
  case "$outcome" in
    complete) note "the run is complete" ;;
    stopped) note "the run was stopped; launch/tpu.sh run goes on from its last checkpoint" ;;
    lost) note "the run was lost: $lost_what" ;;
    *)
      note "the run left with $code on host ${first:-?} first${lost_what:+: $lost_what}"
      if [ -n "$first" ] && [ "$first" != "$host" ]; then show_end "$first"; fi ;;
  esac
}

show_end() { # HOST: the end of its log
  say "the end of the log of host $1 (${host_names[$1]}):"
  on_host "$1" 'bash kr_jax/host.sh tail 20' 2>/dev/null | sed 's/^/  | /' >&2 || true
}
