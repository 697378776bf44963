#!/usr/bin/env bash
# Install into .venv (once) and run the main job; without arguments on the digits of scikit-learn.
#   bash launch/local.sh [--config=configs/fashion_mnist.py --workdir=runs/fashion_mnist ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
# shellcheck disable=SC2086  # several extras are several words
ensure_venv ${LFM_EXTRAS:-}
[ $# -gt 0 ] || set -- --config=configs/digits.py --workdir=runs/digits
# Huge pages for the buffers that XLA's CPU programs take and give back at every step: a quarter off
# the time of a train step. Other C libraries ignore it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec .venv/bin/python -m lfm_jax.main "$@"
