#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated and exported image-text model on real pictures, in
# minutes on two cores.
#   bash launch/quickstart.sh [RUN_FOLDER]        default: runs/quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/quickstart}
EXTRAS=demo
. launch/setup_env.sh

echo "== data: OpenMoji pictures with captions in 14 languages"
mmjax data build openmoji
mmjax data tokenizer --source openmoji --split train+validation --languages en \
  --vocab-size 1024 --name quickstart
echo "== train"
mmjax train --config configs/quickstart.py --workdir "$run"
echo "== evaluate"
mmjax eval --checkpoint "$run"
echo "== export"
rm -rf "$run/export"
mmjax export --checkpoint "$run" --to safetensors --out "$run/export"
echo
echo "Done. Look at $run/report.html; scores are in $run/eval.json, weights in $run/export."
