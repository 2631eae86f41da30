#!/usr/bin/env bash
# Sets up and runs the tests.   bash launch/test.sh [--quick | --all] [pytest arguments]
# --quick takes minutes and touches every part; --all adds full scores, long kill loops, benchmarks.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=dev
. launch/setup_env.sh

# A test that hangs ends the run after 15 minutes, with its name and the stacks of its threads.
select=(-m "not slow" --max-worker-restart=0)
select+=(-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true)
quick=(tests/test_{architecture,config,kinds,special_tokens}.py tests/data/test_{image,sources}.py
  tests/data/readers/test_forms.py tests/parallel/test_mesh_and_rules.py
  tests/models/test_transformer.py tests/objectives/test_contrastive.py
  tests/state/test_checkpoint.py tests/evaluation/test_text_metrics.py
  tests/training/test_summary.py tests/inference/test_search.py tests/interop/test_heads.py
  tests/plan/test_cost.py tests/launch/test_scripts.py tests/e2e/test_trust.py
  tests/starter/test_init.py::test_the_command_writes_a_file_once)
case ${1:-} in
  --all) select=(); shift ;;
  --quick) select+=("${quick[@]}"); shift ;;
esac
export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
ruff check mmjax configs tests setup.py
ruff format --check --quiet mmjax configs tests setup.py
mypy
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${select[@]}" "$@"
