#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: finds or creates it, copies this repository to every host,
# installs, runs, follows.
set -euo pipefail

usage() {
  cat <<'END'
Usage: bash launch/tpu_vm.sh NAME --zone ZONE [OPTIONS] [--] --config FILE --workdir DIR
         [--config.k=v ...]
Runs `mmjax train` on every host of the TPU VM NAME, under the rule of launch/restart.sh, apart from
this terminal: when the connection is lost, or after Ctrl-C here, the same command follows the run
that goes on. Needs gcloud, logged in. DIR has to be a folder that all hosts share.
  --project P        project; default: gcloud's
  --create TYPE      create it if there is none, for example v5litepod-16 or v6e-16; needs
                     --version. A preempted one is deleted and created again, and the run goes on
                     from its last checkpoint
  --version V        runtime version: v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p),
                     v2-alpha-tpuv6e, tpu-ubuntu2204-base (v4)
  --spot             create it as a spot VM: cheaper, may be preempted at any time
  --queue            create it as a queued resource: waits until there is capacity
  --env K=V          an environment variable of the run, such as MMJAX_DATA=DIR; may be repeated
  --max-restarts N   restarts after a failure; default: train.on_restart of the config
  --stop             stop the run: every host saves the same step (exit code 75); the TPU VM stays
  --dry-run          print the commands, run nothing
Example: bash launch/tpu_vm.sh pod --zone us-west4-a --create v5litepod-16 \
           --version v2-alpha-tpuv5-lite --spot \
           --config configs/quickstart.py --workdir /mnt/share/runs/quickstart
END
}

say() { echo "tpu_vm: $*" >&2; }

name='' place=() type='' version='' spot=() queue=0
exports='MMJAX_COORDINATOR=auto' rule='' stop=0 dry=0
while [ $# -gt 0 ]; do
  case $1 in
    --zone | --project | --create | --version | --env | --max-restarts)
      [ -n "${2:-}" ] || { say "$1 takes a value"; exit 2; }
      case $1 in
        --zone | --project) place+=("$1=$2") ;;
        --create) type=$2 ;;
        --version) version=$2 ;;
        --env) exports+=" $(printf '%q' "$2")" ;;
        --max-restarts) rule="--max-restarts $(printf '%q' "$2") " ;;
      esac
      shift ;;
    --spot) spot=(--spot) ;;
    --queue) queue=1 ;;
    --stop) stop=1 ;;
    --dry-run) dry=1 ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    -*) break ;;
    *) [ -z "$name" ] || break; name=$1 ;;
  esac
  shift
done
[[ -n $name && " ${place[*]:-}" = *' --zone='* ]] || { usage >&2; exit 2; }
[ $stop = 1 ] || [ $# -gt 0 ] || {
  say 'no --config and --workdir for mmjax train; see --help'
  exit 2; }
[ -z "$type" ] || [ -n "$version" ] || { say '--create needs --version; see --help'; exit 2; }
cd "$(dirname "$0")/.."

show() {
  local word
  printf 'would run:'
  for word in "$@"; do
    if [[ $word = *[!a-zA-Z0-9_./:=@,-]* ]]; then word=${word@Q}; fi
    printf ' %s' "$word"
  done
  echo
}
cloud() { if [ $dry = 1 ]; then show gcloud compute tpus "$@"; else gcloud compute tpus "$@"; fi; }
on_all() { cloud tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"; }
state() {
  gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)' 2>/dev/null ||
    true
}

create() {
  if [ $queue = 1 ]; then
    cloud queued-resources create "$name" --node-id="$name" "${place[@]}" \
      --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
  else
    cloud tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" --version="$version" \
      "${spot[@]}"
  fi
}

delete() {
  if [ $queue = 1 ]; then
    cloud queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    cloud tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

# Until there is a TPU VM that is ready.
await_ready() {
  local now asked=0
  while :; do
    now=$(state)
    case $now in
      READY) return ;;
      '')
        if [ $asked = 0 ]; then
          [ -n "$type" ] || {
            say "there is no TPU VM $name here; --create TYPE makes one"
            exit 1; }
          create
          asked=1
        fi ;;
      PREEMPTED | TERMINATED | STOPPED)
        [ -n "$type" ] || { say "$name is $now; with --create it is made anew"; exit 1; }
        say "$name is $now; creating it again"
        delete
        create
        asked=1 ;;
      *) say "$name is $now; waiting" ;;
    esac
    [ "$(state)" = READY ] || sleep "${TPU_POLL_SECONDS:-20}"
  done
}

# A host whose run goes on is left as it is. mmjax needs Python 3.11 or later; the images of v4 to
# v6e bring 3.10.
install="! kill -0 \$(cat mmjax/train.pid 2>/dev/null) 2>/dev/null || exit 0; mkdir -p mmjax && tar xzf mmjax.tgz -C mmjax && cd mmjax && \
for v in 3.13 3.12 3.11; do command -v python\$v >/dev/null && break; done; \
command -v python\$v >/dev/null || sudo apt-get -qq install -y python3.11 python3.11-venv >/dev/null; \
export MMJAX_PYTHON=python\$v EXTRAS=tpu; set -eu; . launch/setup_env.sh"
train="bash launch/restart.sh ${rule}-- mmjax train$(printf ' %q' "$@")"
run="cd mmjax && . .venv/bin/activate && export $exports && \
if ! kill -0 \$(cat train.pid 2>/dev/null) 2>/dev/null; then rm -f train.code; : > train.log; \
setsid bash -c $(printf '%q' "$train & echo \$! > train.pid; wait \$!; echo \$? > train.code") > train.log 2>&1 < /dev/null & sleep 2; fi; \
tail -n +1 -F --pid=\$(cat train.pid) train.log"
halt="kill -TERM \$(cat mmjax/train.pid)"
# What each host's run ended with, a line each; a host that is still running, or cannot be asked,
# says so.
outcome="sleep 2; cat mmjax/train.code 2>/dev/null || echo running"

if [ $stop = 1 ]; then on_all "$halt"; exit; fi
archive=${TMPDIR:-/tmp}/mmjax-$$.tgz
pack=(tar czf "$archive" --exclude=__pycache__ setup.py pyproject.toml README.md mmjax configs
  launch)
if [ $dry = 1 ]; then
  cloud tpu-vm describe "$name" "${place[@]}" --format='value(state)'
  if [ -n "$type" ]; then echo "unless it is READY:"; create; fi
  show "${pack[@]}"
else
  trap 'rm -f "$archive"' EXIT
  "${pack[@]}"
fi

while :; do
  [ $dry = 1 ] || await_ready
  cloud tpu-vm scp "$archive" "$name:mmjax.tgz" "${place[@]}" --worker=all
  on_all "$install"
  if [ $dry = 1 ]; then on_all "$run"; on_all "$outcome"; exit 0; fi
  while [ "$(state)" = READY ]; do
    on_all "$run" || say 'the connection ended'
    codes=$(on_all "$outcome" 2>/dev/null | grep -xE '[0-9]+|running') || codes=running
    [[ $codes != *running* ]] || continue
    for code in $codes; do [ "$code" = 0 ] || exit "$code"; done
    exit 0
  done
  say "$name is $(state)"
done
