# shellcheck shell=bash
# Sourced by the other scripts: the active virtual environment, or .venv made here; then mmjax
# installed with EXTRAS. Needs python3 (3.11 to 3.13) and pip. MMJAX_PYTHON names another
# interpreter.
python=${MMJAX_PYTHON:-python3}
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
      found=$("$python" -V 2>&1)
      echo "mmjax needs Python 3.11 to 3.13; $python is $found. Set MMJAX_PYTHON to another." >&2
      exit 2; }
    echo "== set-up: virtual environment in .venv"
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
# Installing again costs seconds, so it is skipped while setup.py and the extras are what was
# installed last.
stamp="$VIRTUAL_ENV/.mmjax-$(cat setup.py pyproject.toml | cksum | cut -d' ' -f1)-$EXTRAS"
if [ ! -e "$stamp" ] || ! python -c 'import mmjax' 2>/dev/null; then
  echo "== set-up: pip install -e .[$EXTRAS]"
  python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[$EXTRAS]"
  touch "$stamp"
fi
