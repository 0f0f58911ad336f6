#!/usr/bin/env bash
# What launch/tpu.sh runs on each host of a TPU slice. It is copied to the home directory there; nobody
# needs to call it by hand.
#
#   bash tpu_host.sh setup HOSTS RESULTS REVISION DIRTY         unpack the code, make the environment; of
#                                                               several HOSTS, ~/tpu_addresses lists them
#   bash tpu_host.sh token                                      keep the Hugging Face token from stdin
#   bash tpu_host.sh run ATTEMPT HOSTS RESULTS BUCKET COMMAND   start COMMAND, or follow it if it runs
#   bash tpu_host.sh current RESULTS BUCKET COMMAND             how many attempts there were, and the one at
#                                                               COMMAND that runs or succeeded
#   bash tpu_host.sh status | logs | stop
#
# COMMAND runs detached from the connection, under a supervisor: a broken connection or a closed laptop
# does not stop it, and connecting again with the same ATTEMPT follows it rather than starting it twice.
#
# ~/jaxlora/src              the unpacked checkout, where COMMAND runs
# ~/jaxlora/venv             its Python environment
# ~/jaxlora/attempts/ID/     log, command, target (RESULTS and BUCKET), number (the first is 1), pid,
#                            started (empty; as old as the start of COMMAND), wrote (empty; there once
#                            results newer than the start are in the bucket), exit (the exit code, once it
#                            is over) and lock, which the supervisor holds while it lives (the kernel
#                            releases it whatever happens). ID holds the time of another machine's clock,
#                            so nothing here is ordered by it.
set -euo pipefail

HOME_DIR=$HOME/jaxlora
HOST=$(hostname)
HOST=${HOST%%.*}
WORKER=${HOST##*-w-} # hosts are called t1v-n-1234abcd-w-0, -w-1, and so on
[[ $WORKER =~ ^[0-9]+$ ]] || WORKER=0
WORKER=$((10#$WORKER))
PUSH_SECONDS=${JAXLORA_PUSH_SECONDS:-60}
STOP_SECONDS=${JAXLORA_STOP_SECONDS:-60}

setup() { # HOSTS RESULTS REVISION DIRTY
  mkdir -p "$HOME_DIR/src" "$HOME_DIR/attempts"
  cd "$HOME_DIR/src"
  # The files of an earlier copy go; results and data stay.
  if [[ -f ../files ]]; then grep -av '/$' ../files | tr '\n' '\0' | xargs -0 rm -f --; fi
  tar --quoting-style=literal -tzf ~/jaxlora.tar.gz >../files
  tar -xzf ~/jaxlora.tar.gz
  printf 'JAXLORA_GIT_SHA=%s JAXLORA_GIT_DIRTY=%s\n' "$3" "$4" >../revision # the archive has no .git
  # The images ship an older Python than the package needs; uv brings one.
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  uv venv --quiet --allow-existing --python 3.12 ../venv
  uv pip install --quiet --python ../venv/bin/python --require-hashes --requirements launch/tpu.lock
  uv pip install --quiet --python ../venv/bin/python --no-deps --editable .
  if (($1 > 1)); then share_results "$2"; fi
  echo "worker $WORKER: ready"
}

# Several hosts write parts of one checkpoint, so they need one folder: worker 0 lends its own over NFS, to
# root (ports below 1024) on the hosts of this slice. Whoever could write there could change the programs
# that every host runs, since compiled ones are kept in that folder.
share_results() { # RESULTS
  local folder=$HOME_DIR/src/$1 address
  mkdir -p "$folder"
  if ((WORKER == 0)); then
    install_package nfs-kernel-server
    while read -r address; do
      printf '%s %s(rw,sync,no_subtree_check,secure,all_squash,anonuid=%s,anongid=%s)\n' \
        "$(exports_name "$folder")" "$address" "$(id -u)" "$(id -g)"
    done <~/tpu_addresses | sudo tee /etc/exports.d/jaxlora.exports >/dev/null
    sudo exportfs -ra
    return
  fi
  install_package nfs-common
  mountpoint -q "$folder" && return
  for _ in {1..60}; do
    sudo mount -t nfs -o actimeo=1 "${HOST%-w-*}-w-0:$folder" "$folder" && return
    sleep 5
  done
  echo "worker $WORKER: cannot mount the results folder of worker 0" >&2
  return 1
}

# A path as exports(5) reads it: with spaces, quotes and the like as octal codes.
exports_name() { # PATH
  if [[ $1 == *[!A-Za-z0-9/._-]* ]]; then
    printf '%s' "$1" | od -An -v -to1 | tr -d '\n' | sed 's/ /\\/g'
  else
    printf '%s' "$1"
  fi
}

# On a new machine the system's own upgrade may hold the package lock for minutes.
install_package() { # NAME
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -qq -y "$1" >/dev/null
}

token() {
  local text
  IFS= read -r text || true
  if [[ -z $text ]]; then echo "no token on standard input" >&2; return 1; fi
  mkdir -p "$HOME_DIR"
  rm -f "$HOME_DIR/token"
  (umask 077 && printf '%s' "$text" >"$HOME_DIR/token")
}

running() { [[ -e $1/lock ]] && ! flock --nonblock --shared "$1/lock" true; } # FOLDER

exit_code() { # FOLDER; without a code it was killed
  local code=''
  read -r code 2>/dev/null <"$1/exit" || true
  [[ $code =~ ^[0-9]+$ ]] || code=137
  echo "$code"
}

# The folders of the attempts on this host, from the first to the last.
attempts() {
  local folder
  for folder in "$HOME_DIR"/attempts/*/; do
    if [[ -e $folder/command ]]; then echo "$(cat "$folder/number" 2>/dev/null || echo 0) ${folder%/}"; fi
  done | sort -n | cut -d ' ' -f 2-
}

run() { # ATTEMPT HOSTS RESULTS BUCKET COMMAND...
  local attempt=$1 folder=$HOME_DIR/attempts/$1 new history=20 wrote=no
  shift
  if [[ ! -e $folder ]]; then
    # The lock is taken before the folder gets its name, so whoever sees the folder sees a held lock.
    new=$(mktemp -d "$HOME_DIR/attempts/.new-XXXXXX")
    exec 9>"$new/lock"
    flock 9
    printf '%q ' "${@:4}" >"$new/command"
    printf '%s\n' "$2" "$3" >"$new/target"
    echo $(($(attempts | wc -l) + 1)) >"$new/number"
    : >"$new/log"
    if mv -T "$new" "$folder" 2>/dev/null; then
      setsid bash "$0" supervise "$attempt" "$@" </dev/null >>"$folder/log" 2>&1 &
      history=+1
    else # another connection was faster
      rm -rf "$new"
    fi
    exec 9>&-
  fi
  flock --shared "$folder/lock" true & # ends with the supervisor
  if ((WORKER == 0)); then
    tail -n "$history" -s 0.2 -F --pid=$! "$folder/log" 2>/dev/null
  else
    wait $!
    if (($(exit_code "$folder") != 0)); then tail -n 20 "$folder/log" | sed "s/^/worker $WORKER: /"; fi
  fi
  if [[ -e $folder/wrote ]]; then wrote=yes; fi
  echo "jaxlora-host: attempt=$attempt worker=$WORKER wrote=$wrote exit=$(exit_code "$folder")"
  return "$(exit_code "$folder")"
}

supervise() { # ATTEMPT HOSTS RESULTS BUCKET COMMAND...
  local attempt=$1 results=$3 bucket=$4 folder=$HOME_DIR/attempts/$1 code=0 pusher
  shift 4
  echo $$ >"$folder/pid"
  # At a shutdown the system sends SIGTERM to every process; the command saves and ends by itself, and
  # this one stays to note its exit code and to copy what it saved.
  trap : TERM
  cd "$HOME_DIR/src"
  stop "$attempt"
  restore "$results" "$bucket" || { finish "$folder" 69; return; }
  touch "$folder/started"
  sleep 0.05 # files get the time of the kernel's last tick; whatever COMMAND writes must be newer
  export PATH=$HOME_DIR/venv/bin:$PATH VIRTUAL_ENV=$HOME_DIR/venv PYTHONUNBUFFERED=1
  # shellcheck disable=SC2046
  export $(cat "$HOME_DIR/revision")
  if [[ -f $HOME_DIR/token ]]; then export HF_TOKEN_PATH=$HOME_DIR/token; fi
  # The children do not inherit the lock, or a daemon left behind would keep the attempt "running".
  push_regularly "$folder" "$results" "$bucket" 9>&- &
  pusher=$!
  "$@" 9>&- || code=$?
  kill "$pusher" 2>/dev/null || true # a SIGTERM to all may have ended it already
  wait "$pusher" || true
  if ! push "$folder" "$results" "$bucket" && ! { sleep "$PUSH_SECONDS"; push "$folder" "$results" "$bucket"; }; then
    echo "the results could not be copied to $bucket"
    if ((code == 0)); then code=74; fi
  elif ((WORKER == 0)) && wrote_something "$folder" "$results"; then
    touch "$folder/wrote"
  fi
  finish "$folder" "$code"
}

# Whether RESULTS holds a file that is newer than the start of COMMAND: that of its first attempt since its
# last success, because a later attempt may find nothing left to do. Only times that this machine's kernel set
# are compared, since copies bring the modification times of other machines. Files of the checkout do not
# count: each new copy of it writes them again.
wrote_something() { # FOLDER RESULTS
  local folder start='' written
  while read -r folder; do
    if ! cmp -s "$folder/command" "$1/command" || [[ ! -e $folder/started ]]; then continue; fi
    if [[ -z $start ]]; then start=$folder/started; fi
    if [[ -e $folder/wrote && $(exit_code "$folder") == 0 ]] && cmp -s "$folder/target" "$1/target"; then start=''; fi
  done < <(attempts)
  [[ -d $2 ]] || return
  written=$(find -H "$2" -name .compiled -prune -o -type f ! -name '*.lock' -cnewer "$start" -print \
    | grep -avxFf ../files) || true
  [[ -n $written ]]
}

finish() { # FOLDER CODE
  echo "$2" >"$1/exit.new"
  mv "$1/exit.new" "$1/exit"
}

# A new machine starts from what the previous one copied to the bucket.
restore() { # RESULTS BUCKET
  local listing
  if [[ -z $2 || -e $HOME_DIR/restored ]] || ((WORKER != 0)); then return 0; fi
  mkdir -p "$1"
  if listing=$(gcloud storage ls "$2/results/" 2>&1); then
    gcloud storage rsync "$2/results" "$1" --recursive --quiet || return
    find "$HOME_DIR/attempts" -name started -exec touch {} + # nothing of this is newer than any start
  elif [[ $listing != *"matched no objects"* ]]; then
    echo "$listing"
    return 1
  fi
  touch "$HOME_DIR/restored"
}

# Everything but the checkpoints goes first: metrics.jsonl in the bucket is never older than a checkpoint
# beside it, however suddenly the machine disappears. Nothing is ever deleted from the bucket.
push() { # FOLDER RESULTS BUCKET
  local quiet=(--no-user-output-enabled --quiet) lock='.*\.lock$' code=0
  [[ -n $3 ]] || return 0
  gcloud storage cp "$1/log" "$3/logs/$(basename "$1")-worker-$WORKER.log" "${quiet[@]}" || code=1
  if ((WORKER == 0)) && [[ -d $2 ]]; then
    gcloud storage rsync "$2" "$3/results" --exclude="$lock,(.*/)?checkpoints/.*" --recursive "${quiet[@]}" || return
    gcloud storage rsync "$2" "$3/results" --exclude="$lock" --recursive "${quiet[@]}" || return
  fi
  return "$code"
}

push_regularly() { # FOLDER RESULTS BUCKET
  trap 'exit 0' TERM # bash lets a copy in progress finish first
  while :; do
    sleep "$PUSH_SECONDS" &
    wait $!
    push "$@" || echo "the results could not be copied to $3; trying again in ${PUSH_SECONDS}s"
  done
}

# SIGTERM lets the command save; SIGKILL follows if it does not end in time. That ends the supervisor too, so
# what it would have copied is copied here.
stop() { # [ATTEMPT TO SPARE]
  local folder group i results bucket
  for folder in "$HOME_DIR"/attempts/*/; do
    folder=${folder%/}
    if [[ $(basename "$folder") == "${1:-}" ]] || ! running "$folder"; then continue; fi
    group=$(cat "$folder/pid")
    kill -TERM -- "-$group" || true
    for ((i = 0; i < STOP_SECONDS; i++)); do running "$folder" || continue 2; sleep 1; done
    kill -KILL -- "-$group" || true
    { IFS= read -r results && IFS= read -r bucket; } <"$folder/target"
    (cd "$HOME_DIR/src" && push "$folder" "$results" "$bucket") || echo "the results could not be copied to $bucket"
  done
}

latest() { attempts | tail -n 1; }

# One line: how many attempts there were, then one of: running ID; busy OTHER-COMMAND; elsewhere OPTIONS (it
# runs with other RESULTS or another BUCKET); succeeded ID; empty ID (succeeded without new results); nothing.
current() { # RESULTS BUCKET COMMAND...
  local folder same='' here='' found='' results bucket
  folder=$(latest)
  if [[ -n $folder ]]; then
    if [[ $(printf '%q ' "${@:3}") == "$(cat "$folder/command")" ]]; then same=1; fi
    if [[ $(printf '%s\n' "$1" "$2") == "$(cat "$folder/target")" ]]; then here=1; fi
    if running "$folder"; then
      if [[ -z $same ]]; then
        found="busy $(cat "$folder/command")"
      elif [[ -z $here ]]; then
        { IFS= read -r results && IFS= read -r bucket; } <"$folder/target"
        found="elsewhere --results '$results' and ${bucket:+--bucket ${bucket%/*}}"
        if [[ -z $bucket ]]; then found+="no --bucket"; fi
      else
        found="running $(basename "$folder")"
      fi
    elif [[ -n $same && -n $here && $(exit_code "$folder") == 0 ]]; then
      found="succeeded $(basename "$folder")"
      if [[ ! -e $folder/wrote ]]; then found=${found/succeeded/empty}; fi
    fi
  fi
  echo "$(attempts | wc -l) $found"
}


status() {
  local folder state
  folder=$(latest)
  [[ -n $folder ]] || { echo "worker $WORKER: nothing was started"; return; }
  if running "$folder"; then state=running; else state="ended with exit code $(exit_code "$folder")"; fi
  echo "worker $WORKER: $state: $(cat "$folder/command")"
  tail -n 1 "$folder/log"
}

logs() {
  local folder
  folder=$(latest)
  [[ -n $folder ]] || { echo "worker $WORKER: nothing was started" >&2; return 1; }
  exec tail -n 200 -F "$folder/log"
}

main() {
  local verb=${1:-}
  shift || true
  case $verb in
    setup) setup "$@" ;;
    token) token ;;
    run) run "$@" ;;
    supervise) supervise "$@" ;;
    current) current "$@" ;;
    status) status ;;
    logs) logs ;;
    stop) stop ;;
    *) echo "error: unknown step '$verb'" >&2; return 2 ;;
  esac
}

# One line, so that bash has read it all before a newer copy may replace this file.
main "$@"; exit
