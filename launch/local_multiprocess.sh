#!/usr/bin/env bash
# One training job in N processes on this machine, as N hosts would run it: they talk over gloo.
set -euo pipefail

usage() {
  cat <<'END'
Usage: bash launch/local_multiprocess.sh N [OPTIONS] --config FILE --workdir DIR [--config.k=v ...]
Starts N processes of `mmjax train`; what follows the options goes to it. Each line of output starts
with the process's number. SIGTERM and Ctrl-C go to all processes: they save one step and exit 75.
When a process fails, the others are ended too. The exit code is the job's: that of the first
process that failed, else 75 if it stopped early, else 0.
  --devices D        simulated CPU devices a process; default 1
  --max-restarts R   runs of the job again after exit code 1 or a killed process; default:
                     train.on_restart of the config
  --backoff S        seconds before the first of them; default 5
  --restart          run again after exit code 75, too
  --grace S          seconds between SIGTERM and SIGKILL for the processes that outlive a failed
                     one; default 10
  --dry-run          print the commands, start nothing
Example: bash launch/local_multiprocess.sh 2 --devices 2 \
           --config configs/quickstart.py --workdir runs/two
END
}

say() { echo "local_multiprocess: $*" >&2; }

processes='' devices=1 grace=10 dry=0 once=0 keep=(--keep-75) rule=()
while [ $# -gt 0 ]; do
  case $1 in
    --devices | --max-restarts | --backoff | --grace)
      case ${2:-} in '' | *[!0-9]*) say "$1 takes a whole number"; exit 2 ;; esac
      case $1 in
        --devices) devices=$2 ;;
        --grace) grace=$2 ;;
        *) rule+=("$1" "$2") ;;
      esac
      shift ;;
    --restart) keep=() ;;
    --dry-run) dry=1 ;;
    --once) once=1 ;;  # one attempt; this script calls itself so, under the restart rule
    --help) usage; exit 0 ;;
    [1-9]*) processes=$1 ;;
    *) break ;;
  esac
  shift
done
case $processes in '' | *[!0-9]*) usage >&2; exit 2 ;; esac
rule=(${keep[@]+"${keep[@]}"} ${rule[@]+"${rule[@]}"})

if [ $dry = 1 ]; then
  echo "would run, again by the rule of launch/restart.sh ${rule[*]:-}:"
  for ((i = 0; i < processes; i++)); do
    echo "MMJAX_COORDINATOR=localhost:PORT MMJAX_PROCESSES=$processes MMJAX_PROCESS_ID=$i" \
         "MMJAX_CPU_DEVICES=$devices" \
         "JAX_PLATFORMS=cpu mmjax train$(printf ' %q' "$@")"
  done
  exit 0
fi
if [ $once = 0 ]; then
  here=$(cd "$(dirname "$0")" && pwd)
  exec bash "$here/restart.sh" ${rule[@]+"${rule[@]}"} -- \
    bash "$here/local_multiprocess.sh" "$processes" --once --devices "$devices" --grace "$grace" \
    "$@"
fi

free_port() {
  python3 -c \
    'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

# Reads on to the end of the output, whatever signal the terminal sends.
numbered() {
  trap '' INT TERM HUP
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

# A process group for each process: a terminal's Ctrl-C comes here only, and SIGKILL reaches data
# workers as well.
set -m
export MMJAX_PROCESSES=$processes MMJAX_CPU_DEVICES=$devices JAX_PLATFORMS=cpu
MMJAX_COORDINATOR=localhost:$(free_port)
export MMJAX_COORDINATOR
ids=()
to_all() {
  local signal=$1 id
  for id in ${ids[@]+"${ids[@]}"}; do
    if [ "$signal" = KILL ]; then
      kill -KILL -- "-$id" 2>/dev/null || true
    else
      kill "-$signal" "$id" 2>/dev/null || true
    fi
  done
}
stopping=0
trap 'stopping=1; to_all TERM' TERM INT HUP
trap 'to_all KILL' EXIT
for ((i = 0; i < processes; i++)); do
  MMJAX_PROCESS_ID=$i mmjax train "$@" < /dev/null > >(numbered "$i") 2>&1 &
  ids+=($!)
done
[ $stopping = 0 ] || to_all TERM

codes=() failed='' stopped=0 left=$processes deadline=''
while [ "$left" -gt 0 ]; do
  sleep 0.2 || true
  for ((i = 0; i < processes; i++)); do
    if [ -n "${codes[i]:-}" ] || kill -0 "${ids[i]}" 2>/dev/null; then continue; fi
    codes[i]=0
    wait "${ids[i]}" || codes[i]=$?
    left=$((left - 1))
    case ${codes[i]} in
      0) ;;
      75) stopped=1 ;;
      *) [ -n "$failed" ] || {
           failed=${codes[i]}
           say "process $i ended with exit code $failed"; } ;;
    esac
  done
  if [ -n "$failed" ] && [ "$left" -gt 0 ]; then
    if [ -z "$deadline" ]; then
      say "ending the other $left"
      to_all TERM
      deadline=$((SECONDS + grace))
    elif [ $SECONDS -ge "$deadline" ]; then
      to_all KILL
    fi
  fi
done
[ -z "$failed" ] || exit "$failed"
[ $stopped = 0 ] || exit 75
