#!/usr/bin/env bash
# Install the test extra into .venv (once) and run the tests; arguments go to pytest.
#   bash launch/test.sh [-m slow] [tests/test_config.py ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
ensure_venv test
# Compiled programs are kept between runs: most of a suite of small networks is compilation.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/jax-cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
.venv/bin/ruff check .
.venv/bin/ruff format --check .
[ $# -gt 0 ] || set -- -m "not slow"
exec .venv/bin/python -m pytest -n 2 --dist=loadfile "$@"
