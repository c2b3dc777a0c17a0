# shellcheck shell=bash disable=SC2034,SC2154  # its variables are those of tpu.sh
# What Google Cloud has of each chip, and whether a type, a zone and a provisioning go together. Sourced by tpu.sh.
# Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x,regions-zones} and
# docs.cloud.google.com/compute/docs/tpus/{tpu-machines,create-tpu-mig-multi-host-slice}, November 2026.

#    chip   API      chips a host, JAX devices a chip, image family or runtime version
chip_table() {
  cat <<'END'
     v4     queued   4   1   tpu-ubuntu2204-base
     v5e    queued   4   1   v2-alpha-tpuv5-lite
     v5p    compute  4   1   ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
     v6e    compute  4   1   ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
     tpu7x  compute  4   2   ubuntu-accel-2404-amd64-tpu-tpu7x
END
}

# Zones that are documented; more are added with time, which is what --any-zone is for.
zones_of() {
  case "$1" in
    v4) echo us-central2-b ;;
    v5e) echo us-central1-a us-south1-a us-west1-c us-west4-a europe-west4-b ;;
    v5p) echo us-central1-a us-east5-a europe-west4-b ;;
    v6e) echo us-central1-b us-east1-d us-east5-a us-east5-b us-south1-ai1b europe-west4-a asia-northeast1-b \
      southamerica-west1-a ;;
    tpu7x) echo us-central1-c us-central1-ai1a ;;
  esac
}

topologies_of() {
  case "$1" in
    v5e | v6e) echo 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 ;;
    v4 | tpu7x) echo 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 ;;
    v5p) echo 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x12x16 8x16x16 16x16x16 16x16x24 ;;
  esac
}

# What creates it: a machine type of Compute Engine, or an accelerator type of the Cloud TPU API.
machine_of() {  # CHIP CHIPS CHIPS_PER_HOST
  case "$1" in
    v4) echo "v4-$(($2 * 2))" ;;  # counted in cores
    v5e) echo "v5litepod-$2" ;;
    v5p) echo "ct5p-hightpu-$3t" ;;
    v6e) echo "ct6e-standard-$3t" ;;
    tpu7x) echo "tpu7x-standard-$3t" ;;
  esac
}

is_in() { case " $2 " in *" $1 "*) return 0 ;; esac; return 1; }  # WORD WORDS

# Sets chip, topology, api, chips, hosts, chips_per_host, devices_per_host, machine and image of $type.
read_type() {
  local row devices_per_chip
  chip="${type%%:*}" topology="${type#*:}"
  case "$type" in v4:* | v5e:* | v5p:* | v6e:* | tpu7x:*) ;; *)
    die "--type=$type: write CHIP:TOPOLOGY, as --type=v5e:4x4; chips: v4 v5e v5p v6e tpu7x" ;;
  esac
  is_in "$topology" "$(topologies_of "$chip")" ||
    die "--type=$type: $chip has no topology $topology; it has $(topologies_of "$chip")"
  row="$(chip_table | grep "^ *$chip ")"
  read -r chip api chips_per_host devices_per_chip image <<<"$row"
  chips=$((${topology//x/*}))
  # v5e and v6e have machines of 1, 4 and 8 chips; slices of more than 8 consist of those with 4.
  case "$chip" in v5e | v6e) if ((chips <= 8)); then chips_per_host=$chips; fi ;; esac
  hosts=$((chips / chips_per_host)) devices_per_host=$((chips_per_host * devices_per_chip))
  machine="$(machine_of "$chip" "$chips" "$chips_per_host")"
}

# Refuses what can only fail, before anything is created.
check_slice() {
  [ -n "$zone" ] || die "say where: --zone=ZONE; $chip is in $(zones_of "$chip")"
  [ -n "$any_zone" ] || is_in "$zone" "$(zones_of "$chip")" ||
    die "--zone=$zone: $chip is in $(zones_of "$chip"); --any-zone takes $zone all the same"
  case "$provisioning" in
    spot | on-demand) ;;
    flex-start)
      [ "$chip" != v4 ] || die "--flex-start: v4 has none; take --spot or --on-demand"
      max_run="${max_run:-7d}" ;;
    '') die "say how the slice is paid for: --spot (cheapest, preempted at any time), --flex-start (waits, then runs" \
      "up to 7 days) or --on-demand" ;;
    *) die "--provisioning=$provisioning: it is spot, flex-start or on-demand" ;;
  esac
  if [ -n "$max_run" ] && [ "$api $provisioning" != 'queued flex-start' ] && [ "$api" = queued ]; then
    die "--max-run=$max_run: a queued resource of $chip has a limit with --flex-start alone; delete the slice yourself"
  fi
}
