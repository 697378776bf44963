#!/usr/bin/env bash
# Check the library's types as pyproject.toml says. Apart from the tests, because the checker brings
# a node of its own, 200 MB.
#   bash launch/types.sh [lfm_jax/flow ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
ensure_venv test types
exec .venv/bin/basedpyright "$@"
