#!/usr/bin/env bash
# Fills in launch/gke_jobset.yaml and applies it with kubectl.
set -euo pipefail

usage() {
  cat <<'END'
Usage: [NAME=VALUE ...] bash launch/gke_jobset.sh [--dry-run] --config FILE --workdir /runs/DIR
         [--config.k=v ...]
Starts `mmjax train` as a JobSet on TPU slices of the cluster that kubectl speaks to. --dry-run
prints the manifest only.
Set in the environment:
  IMAGE          container image, built with launch/Dockerfile; required
  CLAIM          claim (ReadWriteMany) mounted at /runs on every host: data in /runs/data, run
                 folders; default mmjax-runs
  NAME           of the JobSet; default mmjax
  ACCELERATOR    default tpu-v5-lite-podslice; also tpu-v6e-slice, tpu-v5p-slice, tpu-v4-podslice
  TOPOLOGY       chips of a slice; default 4x4
  CHIPS          chips of a host; default 4
  SLICES         default 1
  MAX_RESTARTS   after failures; default 10
  GRACE_SECONDS  between SIGTERM and SIGKILL; default 300
Stop it with: kubectl delete jobset NAME (each host saves; started again, the run goes on)
Example: IMAGE=mmjax:tpu TOPOLOGY=8x8 bash launch/gke_jobset.sh \
           --config configs/quickstart.py --workdir /runs/quickstart
END
}

say() { echo "gke_jobset: $*" >&2; }

dry=0
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1; shift ;;
    --help) usage; exit 0 ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || { usage >&2; exit 2; }
[ -n "${IMAGE:-}" ] || { say 'set IMAGE to the container image; see --help'; exit 2; }
NAME=${NAME:-mmjax} CLAIM=${CLAIM:-mmjax-runs} SLICES=${SLICES:-1}
MAX_RESTARTS=${MAX_RESTARTS:-10} GRACE_SECONDS=${GRACE_SECONDS:-300}
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4} CHIPS=${CHIPS:-4}
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || {
  say "TOPOLOGY=$TOPOLOGY is not like 4x4 or 2x2x4"; exit 2; }
for number in CHIPS SLICES MAX_RESTARTS GRACE_SECONDS; do
  [[ ${!number} =~ ^[0-9]+$ ]] || { say "$number=${!number} is not a whole number"; exit 2; }
done
[ "$CHIPS" -gt 0 ] && [ $((${TOPOLOGY//x/*} % CHIPS)) = 0 ] || {
  chips=$((${TOPOLOGY//x/*}))
  say "TOPOLOGY=$TOPOLOGY has $chips chips, which CHIPS=$CHIPS a host does not divide"
  exit 2; }
# shellcheck disable=SC2034  # read by its name below
HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
ARGS='["train"'
for word in "$@"; do
  word=${word//\\/\\\\}
  ARGS+=", \"${word//\"/\\\"}\""
done
ARGS+=']'

manifest=$(cat "$(dirname "$0")/gke_jobset.yaml")
for name in NAME IMAGE CLAIM ACCELERATOR TOPOLOGY CHIPS SLICES MAX_RESTARTS GRACE_SECONDS HOSTS \
  ARGS; do
  manifest=${manifest//"\${$name}"/"${!name}"}
done
if [ $dry = 1 ]; then echo "$manifest"; else kubectl apply -f - <<< "$manifest"; fi
