# shellcheck shell=bash disable=SC2034,SC2154  # its variables are those of tpu.sh
# How tpu.sh calls other programs, sleeps, and says what went wrong. Sourced by tpu.sh.

exec 3>&1 # where --dry-run prints, also from inside $(...)

# A connection that breaks is noticed within a minute.
ssh_flags=(--ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=20 --ssh-flag=-oServerAliveCountMax=3)

say() { printf '%s\n' "$*" >&2; }
plural() { ((hosts == 1)) || echo s; }
die() { say "error: $*"; exit 2; }

# A note of what was done: on the terminal, and with its date in keep.log.
note() {
  say "$*"
  [ -n "$dry_run" ] || printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" >>"$state/keep.log"
}

# Sleeps. TPU_SECOND is what a second of this script takes (default 1): tests shorten it.
snooze() {
  [ -z "$dry_run" ] || return 0
  sleep "$(awk -v n="$1" -v second="${TPU_SECOND:-1}" 'BEGIN { print n * second }')"
}

# Runs a command; with --dry-run prints it, quoted, instead. Every gcloud line goes through here.
# What a failed one wrote stands in $scratch/error, for `reason`; with `loud` it is shown, too. With `terminal` the
# command has the terminal to itself.
call() {
  local error status=0
  if [ -n "$dry_run" ]; then
    quote "$@" >&3
    return 0
  fi
  if [ -n "$terminal" ]; then
    "$@"
    return
  fi
  error="$(mktemp "$scratch/call.XXXXXX")"
  "$@" 2>"$error" || status=$?
  if [ "$status" != 0 ]; then cp "$error" "$scratch/error"; fi
  if [ "$status" != 0 ] && [ -n "$loud" ]; then cat "$error" >&2; fi
  rm -f "$error"
  return "$status"
}

# Prints words as a shell takes them.
quote() {
  local word flag line='' one="'" escaped="'\\''"
  for word in "$@"; do
    flag=''
    case "$word" in --[a-z]*=*) flag="${word%%=*}=" word="${word#*=}" ;; esac
    if [ "$(printf %q "$word")" != "$word" ]; then word="$one${word//$one/$escaped}$one"; fi
    line="$line $flag$word"
  done
  printf '%s\n' "${line# }"
}

gcp() { call gcloud "$@" --project="$project" --quiet; }

# What the last failed call means: exists, missing, stockout, quota, refused (a new try does not mend it), passing or
# unknown.
reason() {
  local text
  text="$(cat "$scratch/error" 2>/dev/null)"
  case "$text" in
    # gcloud waits half an hour for what it has asked for, and it may come later.
    *lready\ exists* | *ALREADY_EXISTS* | *"underway remotely"*) echo exists ;;
    *ESOURCE_POOL_EXHAUSTED* | *no\ more\ capacity* | *not\ have\ enough\ resources* | *resource_availability* | \
      *currently\ unavailable* | *nsufficient*capacity* | *STOCKOUT*) echo stockout ;;
    *uota*exceed* | *uota*exhausted* | *uota*imit* | *QUOTA_EXCEEDED*) echo quota ;;
    *PERMISSION_DENIED* | *"does not have permission"* | *"Required '"*permission* | *INVALID_ARGUMENT* | \
      *"nvalid choice"* | *"nrecognized arguments"* | *"has not been used"* | *"is disabled"* | \
      *"nvalid value"* | *"do not currently have an active account"* | *eauthent*) echo refused ;;
    *"not found"* | *"NOT_FOUND"* | *"not exist"*) echo missing ;;
    # Users report it where there was no room for a flex-start request.
    *nternal\ error* | *INTERNAL_ERROR*) echo passing ;;
    *) echo unknown ;;
  esac
}

# Says what the last failed call wrote, and what helps.
explain() {
  say "$1"
  sed 's/^/  | /' "$scratch/error" >&2
  case "$(reason)" in
    stockout) say "  $zone has no $machine just now: wait, try another zone ($(zones_of "$chip"))," \
      "or let --keep try again" ;;
    quota) say "  the project's quota is too small: ask for $chips chips of $chip in $zone ($provisioning), under the" \
      "name above, at https://console.cloud.google.com/iam-admin/quotas?project=$project" \
      "(the Cloud TPU API and Compute Engine have quotas of their own; failed requests count until they are deleted)" ;;
    refused)
      if grep -q 'nvalid choice\|nrecognized arguments' "$scratch/error"; then
        say "  this gcloud is too old for it: gcloud components update"
      elif grep -q 'has not been used\|is disabled' "$scratch/error"; then
        say "  enable it: gcloud services enable compute.googleapis.com tpu.googleapis.com --project=$project"
      elif grep -q 'active account\|eauthent' "$scratch/error"; then
        say "  log in: gcloud auth login"
      fi ;;
  esac
}

# Whole seconds of 90, 90s, 15m, 6h or 2d.
seconds_of() { # FLAG VALUE
  local n="${2%[smhd]}"
  case "$n" in '' | *[!0-9]*) die "$1=$2: write a duration, as 90s, 15m, 6h or 2d" ;; esac
  case "$2" in *m) n=$((n * 60)) ;; *h) n=$((n * 3600)) ;; *d) n=$((n * 86400)) ;; esac
  echo "$n"
}
