#!/usr/bin/env bash
# Runs a command on a Cloud TPU slice: creates the slice, copies this checkout to it, runs the command on
# every host, copies logs and results to a bucket, resumes after a preemption, and tears the slice down.
# launch/tpu_slice.sh manages the slice; launch/tpu_host.sh is the half that runs on the hosts.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
source "$root/launch/tpu_slice.sh"

usage() {
  cat <<'END'
usage: launch/tpu.sh STEP --name NAME --zone ZONE --type TYPE [options] [-- COMMAND ...]

Runs COMMAND on every host of a Cloud TPU slice. For example, the whole study on a spot v5e-8:

  launch/tpu.sh all --name study --zone us-west4-a --type v5e-8 --queued --spot \
      --bucket gs://my-bucket -- python launch/study.py --config configs/main.py

Add --dry-run to see every cloud command first, without running any.

steps
  all      up, run, and down once COMMAND has succeeded and its results are in the bucket
  up       create the slice, or wait for it; copy this checkout; install the package
  run      up where needed, start COMMAND, show its output, resume it after a preemption. Given again
           while COMMAND is running, it follows that run. COMMAND keeps running when this script is
           interrupted.
  status   show what the slice and the command on it are doing
  logs     follow the output of the last COMMAND
  stop     ask COMMAND to save and end; the slice stays
  down     stop COMMAND, copy its results, delete the slice

options
  --name NAME          name of the slice, and of its folder in the bucket
  --zone ZONE          zone, such as us-central2-b (v4) or us-west4-a (v5e)
  --project PROJECT    project; default: that of your gcloud configuration
  --type TYPE          v4-8, v4-16, ... v5e-4, v5e-8, v5e-16, ... v5p-8, ... v6e-4, v6e-8, ... (v4 and
                       v5p count two a chip, v5e and v6e one; v5litepod-8 is the same as v5e-8)
  --spot               cheaper, but may be taken away at any time; the run then resumes by itself
  --queued             wait in the queue for a slice instead of asking again and again
  --bucket gs://...    where logs and results are copied, under NAME/, every minute; a new slice starts
                       from there. Needed by `all` and by --spot.
  --results FOLDER     folder that COMMAND writes to, relative to the checkout; default: results
  --again              `run` and `all`: run COMMAND again although it has succeeded on this slice
  --keep               `all` does not delete the slice at the end
  --max-failures N     how many times a COMMAND that failed is started again; default 2
  --max-resumes N      how many times it resumes after a preemption or a lost connection; default 100
  --max-wait SECONDS   the longest time to wait for a slice; default 259200 (three days)
  --poll-min SECONDS   wait before looking again, doubled each time up to --poll-max; defaults 10 and 300
  --create-flag=FLAG   passed on to the create command, such as --create-flag=--subnetwork=tpu; repeatable
  --connect-flag=FLAG  passed on to ssh and scp, such as --connect-flag=--internal-ip; repeatable
  --dry-run            print the cloud commands and run none

COMMAND must be resumable: started again, it continues. Its exit code decides what happens next: 0 means
done, 2 a mistake in the command or its configuration (nothing is retried), 75 that it was interrupted and
has saved (it resumes), and anything else a failure (retried --max-failures times).

HF_TOKEN, when set, is sent to the hosts over standard input and kept there in a file that only you can
read. It appears in no command line and no log. Uncommitted changes to tracked files are copied too;
untracked files are not.

Exit code: that of COMMAND; 2 for a mistake that you can correct; 1 when the cloud failed; 74 when `all`
kept the slice because COMMAND, though it succeeded, left nothing new under --results; 130 when
interrupted, in which case the slice and COMMAND keep running.
END
}

say() { printf 'tpu: %s\n' "$*" >&2; }
stop_with() { # CODE MESSAGE
  printf 'error: %s\n' "${2//[[:cntrl:]]/?}" >&2 # one line, whatever was typed
  exit "$1"
}

# ---- options -------------------------------------------------------------------------------------------

parse() {
  name='' zone='' project='' type='' bucket='' results=results spot='' queued='' again='' keep='' dry_run=''
  max_failures=2 max_resumes=100 max_wait=259200 poll_min=10 poll_max=300
  create_flags=() connect_flags=() command=()
  step=${1:-}
  case $step in
    all | up | run | status | logs | stop | down) shift ;;
    -h | --help | help) usage; exit 0 ;;
    *) stop_with 2 "say what to do: all, up, run, status, logs, stop or down (see launch/tpu.sh --help)" ;;
  esac
  while (($#)); do
    local option=$1 value=''
    shift
    case $option in
      --) command=("$@"); break ;;
      -h | --help) usage; exit 0 ;;
      --spot | --queued | --again | --keep | --dry-run) ;;
      --spot=* | --queued=* | --again=* | --keep=* | --dry-run=*)
        stop_with 2 "${option%%=*} takes no value; leave it out if you do not want it" ;;
      --*=*) value=${option#*=} option=${option%%=*} ;;
      --*) (($#)) || stop_with 2 "$option needs a value"; value=$1; shift ;;
      *) stop_with 2 "unexpected '$option'; the command for the slice goes after --" ;;
    esac
    case $option in
      --name) name=$value ;;
      --zone) zone=$value ;;
      --project) project=$value ;;
      --type) type=$value ;;
      --bucket) bucket=${value%/} ;;
      --results) results=${value%/} ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --again) again=1 ;;
      --keep) keep=1 ;;
      --dry-run) dry_run=1 ;;
      --max-failures | --max-resumes | --max-wait | --poll-min | --poll-max)
        [[ $value =~ ^0*[0-9]{1,9}$ ]] \
          || stop_with 2 "$option needs a whole number from 0 to 999,999,999, not '$value'"
        option=${option#--}
        # In base 10: arithmetic would take 010 for eight, and 08 for a mistake.
        printf -v "${option//-/_}" '%s' "$((10#$value))" ;;
      --create-flag | --connect-flag)
        [[ $value == --?* ]] || stop_with 2 "$option needs a flag of gcloud with its dashes, not '$value'"
        if [[ $option == --create-flag ]]; then create_flags+=("$value"); else connect_flags+=("$value"); fi ;;
      *) stop_with 2 "unknown option $option (see launch/tpu.sh --help)" ;;
    esac
  done
  check
}

check() {
  local LC_ALL=C # ranges such as a-z are ASCII, whatever the language of this machine
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] \
    || stop_with 2 "--name needs lowercase letters, digits and dashes (at most 63), starting with a letter"
  [[ -n $zone ]] || stop_with 2 "--zone is missing, such as --zone us-west4-a"
  [[ $zone =~ ^[a-z][-a-z0-9]*$ ]] || stop_with 2 "--zone must look like us-west4-a, not '$zone'"
  [[ -z $project || $project =~ ^[a-z0-9][-a-z0-9.:]*$ ]] \
    || stop_with 2 "--project must be a project ID such as my-project, not '$project'"
  [[ -z $bucket || $bucket =~ ^gs://[a-zA-Z0-9][-_.a-zA-Z0-9]*(/[-_.=+@,a-zA-Z0-9]+)*$ ]] \
    || stop_with 2 "--bucket must look like gs://my-bucket or gs://my-bucket/folder, not '$bucket'"
  check_results
  case $step in
    all | run) ((${#command[@]})) || stop_with 2 "no command given; put it after --" ;;
    *) ((${#command[@]} == 0)) || stop_with 2 "$step takes no command" ;;
  esac
  case $step in
    all | up | run) resolve_type ;;
  esac
  case $step in
    all | run)
      [[ -n $bucket || ($step == run && -z $spot) ]] \
        || stop_with 2 "--bucket is missing: without it the results are lost with the slice" ;;
  esac
  where=(--zone="$zone")
  if [[ -n $project ]]; then where+=(--project="$project"); fi
  where+=(--quiet)
  if [[ -n $bucket ]]; then bucket+=/$name; fi
}

check_results() {
  case /$results/ in
    *//* | */./* | */../*) stop_with 2 "--results must be a folder inside the checkout, not '$results'" ;;
    /-*) stop_with 2 "--results needs a folder, and '$results' looks like an option" ;;
    *[]\*\?[]* | *[[:cntrl:]]*) # gcloud reads the first four as wildcards
      stop_with 2 "--results cannot hold *, ?, [, ] or control characters: give the folder another name" ;;
  esac
}

# ---- the checkout ------------------------------------------------------------------------------------

# Packs this checkout, with the uncommitted changes to tracked files, as one archive for the whole session.
pack() {
  local tree untracked
  git -C "$root" rev-parse --quiet --verify HEAD >/dev/null 2>&1 \
    || stop_with 2 "$root is not a git checkout; clone the repository to run it on a slice"
  revision=$(git -C "$root" rev-parse HEAD) dirty=0 tree=''
  git -C "$root" diff --quiet HEAD || dirty=1
  cp "$root/launch/tpu_host.sh" "$scratch/tpu_host.sh"
  if [[ -n $dry_run ]]; then return; fi
  tree=$(git -C "$root" stash create) # a commit of the changes that no branch sees
  untracked=$(git -C "$root" ls-files --others --exclude-standard | wc -l)
  if ((untracked)); then say "$((untracked)) untracked files are not copied; \`git add\` those that are needed"; fi
  git -C "$root" archive --format=tar.gz --output="$scratch/jaxlora.tar.gz" "${tree:-HEAD}"
}

# Refused before anything is created: the token travels as one line.
check_token() {
  [[ $token != *[[:space:]]* ]] || stop_with 2 "HF_TOKEN holds a space or a line break; set it to the bare token"
}

send_token() { # WORKER
  on_hosts "$1" bash tpu_host.sh token < <(printf '%s\n' "$token")
}

set_up() {
  local worker files=("$scratch/jaxlora.tar.gz" "$scratch/tpu_host.sh")
  if ((hosts > 1)); then
    retry list_addresses || stop_with 1 "the addresses of the $hosts hosts of $name are not known; $how_to_end"
    files+=("$scratch/tpu_addresses")
  fi
  say "copying this checkout to $hosts host(s) and installing it"
  retry cloud compute tpus tpu-vm scp "${files[@]}" "$name:" --worker=all \
    "${where[@]}" ${connect_flags[@]+"${connect_flags[@]}"} </dev/null \
    || stop_with 1 "the checkout could not be copied to $name; $how_to_end"
  retry on_hosts all bash tpu_host.sh setup "$hosts" "$results" "$revision" "$dirty" </dev/null \
    || stop_with 1 "the package could not be installed on $name; $how_to_end"
  if [[ -n $token ]]; then
    # One host at a time: several connections would share one standard input.
    for ((worker = 0; worker < hosts; worker++)); do
      retry send_token "$worker" || stop_with 1 "the token could not be sent to $name; $how_to_end"
    done
  fi
  fresh=''
}

# ---- the command ---------------------------------------------------------------------------------------

new_attempt() {
  attempts=$((attempts + 1))
  attempt=$(date -u +%Y%m%dT%H%M%SZ)-$(printf %03d "$attempts")
  if [[ -n $dry_run ]]; then attempt=ATTEMPT; fi
}

# A slice that was there before may be running the command, or have finished it while nobody was looking. It
# counts its attempts, so no two of them share a name, whatever this machine's clock says.
find_attempt() {
  local answer
  answer=$(on_hosts 0 bash tpu_host.sh current "$results" "$bucket" "${command[@]}" </dev/null 2>/dev/null) \
    || answer=''
  if [[ $answer =~ ^([0-9]+)\ (.*)$ ]]; then attempts=$((10#${BASH_REMATCH[1]})) answer=${BASH_REMATCH[2]}; fi
  case $answer in
    busy\ *) stop_with 2 "$name runs another command: ${answer#busy }(launch/tpu.sh stop ends it)" ;;
    elsewhere\ *)
      stop_with 2 "$name runs this command with ${answer#elsewhere }; give those, or end it (launch/tpu.sh stop)" ;;
    running\ *)
      attempt=${answer#running }
      say "$name runs this command already; following it" ;;
    succeeded\ * | empty\ *)
      if [[ -n $again || ($step == all && $answer == empty*) ]]; then return; fi
      attempt=${answer#* }
      say "this command has succeeded on $name already; --again runs it again" ;;
  esac
}

# Starts or follows the attempt. Sets code and outcome: done, mistake, unsaved, interrupted, lost, failed;
# and wrote, once an attempt has left something new under --results.
follow() {
  local codes report
  code=0 outcome='done'
  on_hosts all bash tpu_host.sh run "$attempt" "$hosts" "$results" "$bucket" "${command[@]}" </dev/null \
    | tee "$scratch/output" || code=${PIPESTATUS[0]}
  if [[ -n $dry_run ]]; then return; fi
  # Each host reports its own code in a line of its own; gcloud passes on only one of them.
  report="jaxlora-host: attempt=$attempt worker="
  codes=" $(sed -n "s/.*${report}[0-9]* wrote=[a-z]* exit=//p" "$scratch/output" | tr '\n' ' ')"
  if grep -q "${report}0 wrote=yes" "$scratch/output"; then wrote=1; fi
  case $codes in
    *' 2 '* | *' 126 '* | *' 127 '*) outcome=mistake ;;
    *' 75 '*) outcome=interrupted ;;
    *' 74 '*) outcome=unsaved ;;
    *)
      if (($(wc -w <<<"$codes") < hosts)); then
        outcome=lost
      elif [[ $codes == *[1-9]* ]]; then
        outcome=failed
        if [[ $(slice_state) != READY ]]; then outcome=interrupted; fi
      fi ;;
  esac
}

run_command() {
  local failures=0 resumes=0
  attempt='' attempts=0 wrote=''
  ensure_slice
  if [[ -z $fresh ]]; then find_attempt; fi
  if [[ -z $attempt ]]; then new_attempt; fresh=1; fi
  while :; do
    if [[ -n $fresh ]]; then set_up; fi
    say "attempt $attempt${bucket:+; logs in $bucket/logs, TensorBoard: tensorboard --logdir $bucket/results}"
    follow
    case $outcome in
      done)
        say "done"
        if [[ $step == run && -z $wrote$dry_run ]]; then say "it left nothing new under $results"; fi
        return ;;
      mistake) stop_with 2 "the command cannot work as given (its message is above); $how_to_end" ;;
      unsaved) stop_with 1 "done, but the results could not be copied to $bucket; $how_to_end" ;;
      interrupted | lost)
        ((resumes++ < max_resumes)) || stop_with 1 "interrupted more than $max_resumes times; $how_to_end"
        say "$outcome (exit code $code); resuming" ;;
      failed)
        ((failures++ < max_failures)) || stop_with "$code" "failed with exit code $code $failures times; $how_to_end"
        say "failed with exit code $code; starting again ($failures of $max_failures)" ;;
    esac
    if [[ $outcome != lost ]]; then new_attempt; fi
    delay=$poll_min
    pause
    ensure_slice
  done
}

# ---- the steps -----------------------------------------------------------------------------------------

# A slice goes only when what COMMAND left on it is in the bucket.
finish_all() {
  if [[ -n $dry_run ]]; then
    say "COMMAND must leave something new under $results; otherwise $name is kept and the exit code is 74"
  elif [[ -z $wrote ]]; then
    stop_with 74 "COMMAND succeeded but left nothing new under $results, so $name is kept: if it writes elsewhere, \
give the same line with --results and that folder; if it had nothing left to do, $how_to_end"
  fi
  if [[ -z $keep ]]; then tear_down; else say "$name is kept; $how_to_end"; fi
}

tear_down() {
  local code=0
  if [[ $(state_of tpu-vm state) == READY ]]; then
    on_hosts all bash tpu_host.sh stop </dev/null || say "nothing on $name could be stopped first"
  fi
  delete_slice || code=$?
  case $code in
    0) say "$name is deleted" ;;
    44) say "there is no $name in $zone; nothing to delete" ;;
    *) stop_with 1 "$name could not be deleted and may cost money; run launch/tpu.sh down again" ;;
  esac
}

print_status() {
  local state
  state=$(state_of queued-resources state.state)
  if [[ $state != MISSING ]]; then echo "queue: $state"; fi
  state=$(state_of tpu-vm state)
  echo "slice: $state"
  if [[ $state == READY ]]; then on_hosts all bash tpu_host.sh status </dev/null; fi
}

print_logs() {
  if [[ $(state_of tpu-vm state) == READY ]]; then
    on_hosts 0 bash tpu_host.sh logs </dev/null
  elif [[ -n $bucket ]]; then
    cloud storage cat "$bucket/logs/*-worker-0.log"
  else
    stop_with 2 "there is no slice $name now; give --bucket to read the logs that were copied there"
  fi
}

interrupted() {
  trap - INT TERM HUP
  say "interrupted. The slice $name, if it was created, and the command on it go on and cost money."
  say "to follow the command again, give the same command line as before"
  say "$how_to_end"
  exit 130
}

main() {
  parse "$@"
  token=${HF_TOKEN:-}
  unset HF_TOKEN # nothing started from here needs it
  exec 3>&2
  if [[ -n $dry_run ]]; then exec 3>&1; fi
  how_to_end="to end the cost: launch/tpu.sh down --name $name --zone $zone${project:+ --project $project}"
  [[ -n $dry_run ]] || command -v gcloud >/dev/null \
    || stop_with 2 "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  fresh='' dry_state=READY
  case $step in
    all | up | run)
      trap interrupted INT TERM HUP
      if [[ $step != run ]]; then dry_state=MISSING; fi
      check_token
      pack
      if [[ -n $bucket ]]; then
        local top=${bucket#gs://}
        top=gs://${top%%/*} # a folder in it need not exist yet
        cloud storage ls "$top" "${where[@]:1}" </dev/null >/dev/null \
          || stop_with 2 "the bucket $top cannot be read; the message of gcloud is above"
      fi ;;
  esac
  case $step in
    up) ensure_slice; set_up ;;
    run) run_command ;;
    all) run_command; finish_all ;;
    status) print_status ;;
    logs) print_logs ;;
    stop) on_hosts all bash tpu_host.sh stop </dev/null ;;
    down) tear_down ;;
  esac
}

main "$@"
