#!/usr/bin/env bash
# The restart rule of every launcher: runs a training command again until it is done.
set -euo pipefail

usage() {
  cat <<'END'
Usage: bash launch/restart.sh [OPTIONS] [--] COMMAND [ARGUMENTS]
Runs COMMAND and looks at its exit code:
  0                 done: exit 0
  75                stopped with a checkpoint saved: run it again (with --keep-75: exit 75)
  1, or a signal    failed: run it again, at most --max-restarts times, waiting longer each time
  anything else     (2: bad usage) running it again would not help: exit with that code
SIGTERM and Ctrl-C go to COMMAND as SIGTERM; it is then not run again, and its exit code is this
script's.
  --max-restarts N  default: train.on_restart of the config that COMMAND names with --config, else
                    10
  --backoff S       seconds before the first restart after a failure, doubled each time up to 5
                    minutes; default 5
  --keep-75         do not run again after 75
  --stop WORDS      on SIGTERM run this instead of sending SIGTERM to COMMAND
  --dry-run         print what would be run, run nothing
Example: bash launch/restart.sh mmjax train --config configs/quickstart.py --workdir runs/quickstart
END
}

say() { echo "restart: $*" >&2; }

limit='' backoff=5 keep=0 stop='' dry=0
while [ $# -gt 0 ]; do
  case $1 in
    --max-restarts | --backoff)
      case ${2:-} in '' | *[!0-9]*) say "$1 takes a whole number"; exit 2 ;; esac
      if [ "$1" = --backoff ]; then backoff=$2; else limit=$2; fi
      shift ;;
    --stop) stop=${2:?--stop takes a command}; shift ;;
    --keep-75) keep=1 ;;
    --dry-run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) say "unknown option $1; see --help"; exit 2 ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || { usage >&2; exit 2; }

# train.on_restart as the command's own config and overrides set it. Asked only when something has
# failed.
limit_of_config() {
  local words=() config='' found
  while [ $# -gt 0 ]; do
    case $1 in
      --config) config=${2:-}; shift ;;
      --config=*) config=${1#--config=} ;;
      --config.*) words+=("$1") ;;
    esac
    shift
  done
  found=$([ -z "$config" ] || mmjax config show "$config" ${words[@]+"${words[@]}"} 2>/dev/null |
          sed -n 's/^train\.on_restart = \([0-9]*\)$/\1/p') || true
  echo "${found:-10}"
}

if [ $dry = 1 ]; then
  echo "would run: $(printf '%q ' "$@")"
  again=$([ $keep = 1 ] && echo no || echo yes)
  echo "again after 75: $again; after 1 or a signal: at most ${limit:-train.on_restart} times"
  exit 0
fi

# The command gets a process group of its own (set -m), so that a terminal's Ctrl-C reaches it once,
# as SIGTERM from here.
set -m
stopping=0 caught=0 child=''
on_signal() {
  caught=1 stopping=1
  [ -n "$child" ] || return 0
  if [ -n "$stop" ]; then bash -c "$stop" || true; else kill -TERM "$child" 2>/dev/null || true; fi
}
trap on_signal TERM INT HUP

failures=0 starts=0 delay=$backoff
while :; do
  # A process of the start before may still be saving: a start that follows another waits for it to
  # leave the run folder.
  [ "$starts" = 0 ] || export MMJAX_OWNER_SECONDS=${MMJAX_OWNER_SECONDS:-300}
  starts=$((starts + 1))
  code=0
  "$@" &
  child=$!
  [ $stopping = 0 ] || kill -TERM "$child" 2>/dev/null || true
  while :; do  # `wait` returns early when a signal comes
    caught=0 code=0
    wait "$child" || code=$?
    [ $caught = 1 ] || break
  done
  child=''
  [ $stopping = 0 ] || exit "$code"
  case $code in
    75)
      [ $keep = 0 ] || exit 75
      say "stopped with a checkpoint saved (75); starting again" ;;
    0) exit 0 ;;
    *)
      [ "$code" = 1 ] || [ "$code" -gt 128 ] || exit "$code"
      limit=${limit:-$(limit_of_config "$@")}
      failures=$((failures + 1))
      [ $failures -le "$limit" ] || {
        say "exit code $code; $limit restarts were allowed, giving up"
        exit "$code"; }
      say "exit code $code; restart $failures of $limit in $delay s"
      sleep "$delay" &
      wait $! || true
      [ $stopping = 0 ] || exit "$code"
      delay=$((delay * 2 > 300 ? 300 : delay * 2)) ;;
  esac
done
