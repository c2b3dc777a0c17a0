# shellcheck shell=bash disable=SC2034,SC2154  # its variables are those of tpu.sh
# Slices of v5p, v6e and TPU7x: Compute Engine. One host is an instance; several are a managed instance group whose
# workload policy joins the chips of its hosts. Sourced by tpu.sh.
# --target-size-policy-mode, without which Compute Engine refuses a group with a topology, and FLEX_START are in gcloud
# since 2026 only; docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice, .../tpu/docs/flex-start.

# Flags that an instance and a template of instances have in common.
compute_flags() {
  echo "--machine-type=$machine" "--image-family=$image" --image-project=ubuntu-os-accelerator-images \
    "--boot-disk-size=${disk}GB" --maintenance-policy=TERMINATE --scopes=cloud-platform "--labels=kr_jax=$name"
  [ "$chip" != tpu7x ] || echo --boot-disk-type=hyperdisk-balanced # it takes no other
  case "$provisioning" in
    spot) echo --provisioning-model=SPOT --instance-termination-action=DELETE ;;
    flex-start) echo --provisioning-model=FLEX_START --instance-termination-action=DELETE ;;
  esac
  if [ -n "$max_run" ]; then
    echo "--max-run-duration=$max_run"
    [ "$provisioning" != on-demand ] || echo --instance-termination-action=DELETE
  fi
  [ -z "$network" ] || echo "--network=$network"
  [ -z "$subnetwork" ] || echo "--subnet=$subnetwork"
}

compute_create() {
  read -r -a flags <<<"$(compute_flags | tr '\n' ' ')"
  if ((hosts == 1)); then
    # Flex-start waits for room, two hours at most; the others have it now or fail.
    [ "$provisioning" != flex-start ] || flags+=("--request-valid-for-duration=$((wait_s < 7200 ? wait_s : 7200))s")
    gcp compute instances create "$name" --zone="$zone" "${flags[@]}"
    return
  fi
  anew policy || return 1
  anew template || return 1
  # bulk: all hosts or none, which a topology demands. do-nothing: a slice that lost a host is made anew as a whole.
  gcp compute instance-groups managed create "$name" --zone="$zone" --size="$hosts" --template="$name" \
    --workload-policy="projects/$project/regions/$region/resourcePolicies/$name" --target-size-policy-mode=bulk \
    --default-action-on-vm-failure=do-nothing
}

# What an earlier attempt left behind may be of other settings.
anew() { "make_$1" || { [ "$(reason)" = exists ] && "drop_$1" && "make_$1"; }; }

make_policy() {
  gcp compute resource-policies create workload-policy "$name" --region="$region" --type=HIGH_THROUGHPUT \
    --accelerator-topology="$topology"
}

drop_policy() { drop compute resource-policies delete "$name" --region="$region"; }

# --region is the subnetwork's, which an instance has from its zone.
make_template() { gcp compute instance-templates create "$name" ${subnetwork:+"--region=$region"} "${flags[@]}"; }

drop_template() { drop compute instance-templates delete "$name"; }

compute_list() { # lines of: name, address, status
  gcp compute instances list --zones="$zone" --filter="labels.kr_jax=$name" --sort-by=name \
    --format='value(name,networkInterfaces[0].networkIP,status)'
}

compute_state() {
  local lines total running
  lines="$(compute_list)" || { echo UNKNOWN; return; }
  total="$(awk 'NF { n++ } END { print n + 0 }' <<<"$lines")"
  running="$(awk '$NF == "RUNNING" { n++ } END { print n + 0 }' <<<"$lines")"
  if ((running == hosts)); then
    echo READY
  elif grep -q 'STOPPING$\|STOPPED$\|SUSPEND\|TERMINATED$' <<<"$lines"; then
    echo "LOST" "$(awk '$NF != "RUNNING" { print $1 " is " $NF }' <<<"$lines" | tr '\n' ' ')"
  elif ((total == 0 && hosts == 1)); then
    echo NONE
  elif ((total == 0)); then
    compute_group_state
  else
    echo "WAITING $running of $hosts hosts run ($(awk '{ print $NF }' <<<"$lines" | sort | uniq -c | tr -s ' \n' ' '))"
  fi
}

# Of a group without instances: waiting for room, refused, or not there.
compute_group_state() {
  local found
  if ! gcp compute instance-groups managed describe "$name" --zone="$zone" --format='value(name)' >/dev/null; then
    if [ "$(reason)" = missing ]; then echo NONE; else echo UNKNOWN; fi
    return
  fi
  found="$(gcp compute instance-groups managed list-errors "$name" --zone="$zone" --limit=1 \
    --format='value(error.code,error.message)')" || found=''
  echo "$found" >"$scratch/error"
  if [ "$(reason)" = quota ]; then echo "FAILED $found"; else echo "WAITING the group has no room yet $found"; fi
}

compute_hosts() { compute_list | awk '{ print $1, $2 }'; } # lines of: name, address

compute_ssh() { # HOST COMMAND
  gcp compute ssh "${host_names[$1]}" --zone="$zone" "${ssh_flags[@]}" --command="$2" </dev/null
}

compute_login() { gcp compute ssh "${host_names[$1]}" --zone="$zone"; } # HOST

compute_copy() { # DIRECTORY HOST: to the home there
  gcp compute scp --recurse "$1" "${host_names[$2]}:" --zone="$zone"
}

compute_delete() {
  if ((hosts == 1)); then
    drop compute instances delete "$name" --zone="$zone"
  else
    drop compute instance-groups managed delete "$name" --zone="$zone" && drop_template && drop_policy
  fi
}
