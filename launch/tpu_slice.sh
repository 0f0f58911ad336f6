# shellcheck shell=bash
# The slice as launch/tpu.sh sees it: its type and state, and how to create it, wait for it and delete it.
# Sourced by launch/tpu.sh, whose options (name, zone, spot, ...) it reads; it sets `fresh` (the slice was
# just created and has no code yet) and `delay` (seconds until the next look).
# shellcheck disable=SC2154,SC2034

# Cloud TPU's own name of the type, the image that goes with it, and the number of hosts.
resolve_type() {
  local family=${type%%-*} size=${type#*-} cores_a_host=4
  [[ $type =~ ^(v4|v5p|v5e|v5litepod|v6e)-[1-9][0-9]{0,4}$ ]] \
    || stop_with 2 "--type must be like v4-8, v5e-8, v5p-8 or v6e-8, not '$type'"
  case $family in
    v4) accelerator=v4-$size version=tpu-ubuntu2204-base ;;
    v5p) accelerator=v5p-$size version=v2-alpha-tpuv5 ;;
    v5e | v5litepod) accelerator=v5litepod-$size version=v2-alpha-tpuv5-lite ;;
    v6e) accelerator=v6e-$size version=v2-alpha-tpuv6e ;;
  esac
  case $family in
    v4 | v5p)
      cores_a_host=8 # two cores a chip, four chips a host
      ((size % 8 == 0)) || stop_with 2 "$family sizes are multiples of 8, not $size" ;;
    *)
      case $size in
        1 | 4 | 8) cores_a_host=$size ;; # one machine
        16 | 32 | 64 | 128 | 256) ;;
        *) stop_with 2 "$family sizes are 1, 4, 8, 16, 32, 64, 128 and 256, not $size" ;;
      esac ;;
  esac
  hosts=$((size / cores_a_host))
}

# The words as one line that a shell reads back as the same words.
quote() { # WORD...
  local word line='' escape="'\\''"
  for word in "$@"; do
    if [[ -z $word || $word == *[!-A-Za-z0-9_./:=,@%+]* ]]; then
      word=${word//\'/$escape}
      word="'$word'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

show() { printf '+ %s\n' "$(quote "$@")" >&3; }

cloud() {
  show gcloud "$@"
  if [[ -z $dry_run ]]; then gcloud "$@"; fi
}

# One word: the state of a resource, MISSING, or UNKNOWN when the cloud does not answer.
state_of() { # KIND FIELD
  local state
  show gcloud compute tpus "$1" describe "$name" --format="value($2)" "${where[@]}"
  if [[ -n $dry_run ]]; then
    if [[ $1 == tpu-vm ]]; then state=$dry_state; elif [[ -n $queued ]]; then state=${dry_state/READY/ACTIVE}; fi
    echo "${state:-MISSING}"
  elif state=$(gcloud compute tpus "$1" describe "$name" --format="value($2)" "${where[@]}" 2>"$scratch/errors"); then
    echo "${state:-UNKNOWN}"
  elif grep -qiE 'NOT_FOUND|not found' "$scratch/errors"; then
    echo MISSING
  else
    cat "$scratch/errors" >&2
    echo UNKNOWN
  fi
}

# The private addresses of the slice's hosts, for the one that lends them its folder.
list_addresses() {
  cloud compute tpus tpu-vm describe "$name" --format="value(networkEndpoints[].ipAddress)" "${where[@]}" </dev/null \
    | tr -cs '0-9.' '\n' | grep -xE '([0-9]{1,3}\.){3}[0-9]{1,3}' >"$scratch/tpu_addresses" || true
  [[ -n $dry_run ]] || (($(wc -l <"$scratch/tpu_addresses") == hosts))
}

# The ssh flags notice a machine that is gone; without them a connection to it would hang forever.
on_hosts() { # WORKER COMMAND...
  cloud compute tpus tpu-vm ssh "$name" --worker="$1" --command="$(quote "${@:2}")" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=20 "${where[@]}" \
    ${connect_flags[@]+"${connect_flags[@]}"}
}

pause() { # doubles the wait up to --poll-max
  if [[ -z $dry_run ]]; then sleep "$delay"; fi
  delay=$((delay * 2 > poll_max ? poll_max : delay * 2))
}

retry() { # COMMAND...; three times
  local attempt
  delay=$poll_min
  for attempt in 1 2 3; do
    if "$@"; then return; fi
    if ((attempt < 3)); then say "that failed; trying again in ${delay}s"; pause; fi
  done
  return 1
}

slice_state() {
  local state
  if [[ -n $queued ]]; then
    state=$(state_of queued-resources state.state)
    if [[ $state != ACTIVE ]]; then echo "$state"; return; fi
  fi
  state_of tpu-vm state
}

create_slice() {
  local flags=(--accelerator-type="$accelerator") code=0
  if [[ -n $spot ]]; then flags+=(--spot); fi
  flags+=(${create_flags[@]+"${create_flags[@]}"} "${where[@]}")
  say "creating the slice $name ($accelerator); this takes minutes"
  if [[ -n $queued ]]; then
    cloud compute tpus queued-resources create "$name" --node-id="$name" --runtime-version="$version" \
      "${flags[@]}" 2>"$scratch/errors" || code=$?
  else
    cloud compute tpus tpu-vm create "$name" --version="$version" "${flags[@]}" 2>"$scratch/errors" || code=$?
  fi
  fresh=1 dry_state=READY
  if ((code == 0)); then return; fi
  cat "$scratch/errors" >&2
  if grep -qi 'quota' "$scratch/errors"; then
    stop_with 2 "no quota for $accelerator${spot:+ spot} in $zone: ask for it, or take another zone or type"
  elif grep -qiE 'ALREADY_EXISTS|already exists' "$scratch/errors"; then
    say "$name exists already"
  elif grep -qiE 'capacity|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL|DEADLINE|timed out' "$scratch/errors"; then
    say "the zone has no capacity now"
  else
    stop_with 2 "the cloud refused to create $name; its message is above"
  fi
}

# Deletes what exists: a queued resource takes its slice with it. Returns 44 when nothing exists.
delete_slice() {
  if [[ $(state_of queued-resources state.state) != MISSING ]]; then
    cloud compute tpus queued-resources delete "$name" --force "${where[@]}"
  elif [[ $(state_of tpu-vm state) != MISSING ]]; then
    cloud compute tpus tpu-vm delete "$name" "${where[@]}"
  else
    return 44
  fi
}

# Returns once the slice is ready, whatever that takes within --max-wait.
ensure_slice() {
  local state waited=0 refused=0
  delay=$poll_min
  while :; do
    state=$(slice_state)
    case $state in
      READY) return ;;
      MISSING)
        create_slice
        if [[ -n $dry_run ]]; then continue; fi ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDED)
        say "$name is $state"
        if [[ $state == FAILED ]] && ((++refused > max_failures)); then
          stop_with 1 "the queue refused $name $refused times; see launch/tpu.sh status"
        fi
        delete_slice || say "it could not be deleted yet" ;;
      STOPPED) cloud compute tpus tpu-vm start "$name" "${where[@]}" || true ;;
      *) say "$name is $state; looking again in ${delay}s" ;;
    esac
    if ((waited >= max_wait)); then
      stop_with 1 "no slice within $max_wait seconds ($name is $state); $how_to_end"
    fi
    # Seconds slept rather than seconds by the clock, which may be set in the meantime.
    waited=$((waited + (delay > 0 ? delay : 1)))
    pause
  done
}
