# shellcheck shell=bash disable=SC2034,SC2154  # its variables are those of tpu.sh
# Slices of v4 and v5e: queued resources of the Cloud TPU API. The request and its TPU have one name. Sourced by tpu.sh.

queued_create() {
  local track=() flags=("--node-id=$name" "--zone=$zone" "--accelerator-type=$machine" "--runtime-version=$image"
    "--valid-until-duration=${wait_s}s" "--labels=kr_jax=$name" --scopes=https://www.googleapis.com/auth/cloud-platform)
  case "$provisioning" in
    spot) flags+=(--spot) ;;
    flex-start) # only the alpha commands know it
      track=(alpha)
      flags+=(--provisioning-model=flex-start "--max-run-duration=$max_run") ;;
  esac
  [ -z "$network" ] || flags+=("--network=$network")
  [ -z "$subnetwork" ] || flags+=("--subnetwork=$subnetwork")
  gcp ${track[@]+"${track[@]}"} compute tpus queued-resources create "$name" "${flags[@]}"
}

queued_state() {
  local found word text
  if ! found="$(gcp compute tpus queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state,state.stateInitiator,state.failedData.error.message)')"; then
    if [ "$(reason)" = missing ]; then echo NONE; else echo UNKNOWN; fi
    return
  fi
  read -r word text <<<"$found"
  case "$word" in
    ACTIVE) queued_node_state ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      echo "$text" >"$scratch/error"
      [ "$word $(reason)" != 'FAILED quota' ] || { echo "FAILED $text"; return; }
      echo "LOST the request is $word $text" ;;
    *) echo "WAITING the request is ${word:-CREATING}" ;;
  esac
}

queued_node_state() {
  local found
  if ! found="$(gcp compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)')"; then
    if [ "$(reason)" = missing ]; then echo "LOST the TPU is gone"; else echo UNKNOWN; fi
    return
  fi
  case "$found" in
    READY | '') echo READY ;;
    CREATING | STARTING | RESTARTING | REPAIRING) echo "WAITING the TPU is $found" ;;
    *) echo "LOST the TPU is $found" ;; # PREEMPTED, TERMINATED, STOPPED, ...
  esac
}

queued_hosts() { # lines of: name, address; the API lists them in the order of their numbers
  gcp compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(networkEndpoints[].ipAddress)' |
    tr -s ';,[:space:]' '\n' | awk -v name="$name" 'NF { print name "-" n++, $1 }'
}

worker_of() { echo "${host_names[$1]##*-}"; } # HOST

queued_ssh() { # HOST COMMAND
  gcp compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$(worker_of "$1")" "${ssh_flags[@]}" --command="$2" \
    </dev/null
}

queued_login() { gcp compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$(worker_of "$1")"; } # HOST

queued_copy() { # DIRECTORY HOST: to the home there
  gcp compute tpus tpu-vm scp --recurse "$1" "$name:" --zone="$zone" --worker="$(worker_of "$2")"
}

queued_delete() { drop compute tpus queued-resources delete "$name" --zone="$zone" --force; } # --force: with its TPU
