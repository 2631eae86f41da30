#!/usr/bin/env bash
# Sets up and runs the tests.   bash launch/test.sh [--all] [pytest arguments]
# --all adds full scores, long kill loops and benchmarks.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=dev
. launch/setup_env.sh

select=(-m "not slow")
if [ "${1:-}" = --all ]; then select=(); shift; fi
export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
ruff check mmjax configs tests setup.py
ruff format --check --quiet mmjax configs tests setup.py
mypy
python -m pytest -n 2 --dist loadfile "${select[@]}" "$@"
