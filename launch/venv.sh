# shellcheck shell=bash
# Sourced by the launchers: makes .venv, installs the package with the named extras once, and
# installs again only when setup.py or the extras have changed.
#   source launch/venv.sh; ensure_venv [extra ...]

ensure_venv() {
  local extras stamp
  extras=$(IFS=,; echo "$*")
  stamp=".venv/.installed-$(cat setup.py <(echo "$extras") | sha256sum | cut -c1-16)"
  [ -e "$stamp" ] && return
  # The system's own may be older than one beside it; ~/.local/bin is where uv puts its.
  local python="" candidate known=(python3 python3.13 python3.12 python3.11)
  for candidate in ${PYTHON:-"${known[@]}" "${known[@]/#/$HOME/.local/bin/}"}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
    then python=$candidate; break; fi
  done
  [ -n "$python" ] || {
    echo "launch: $("${PYTHON:-python3}" --version 2>&1) found; expected Python 3.11 to 3.13 (set PYTHON=...)" >&2
    exit 2
  }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  if [[ ",$extras," == *,test,* ]]; then
    # First and pinned: left to the resolver, torch arrives with gigabytes of CUDA libraries.
    # Where PyPI has no CPU build of it, TORCH_INDEX_URL names an index that has.
    .venv/bin/python -m pip install -q ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==2.13.0"
    # Its metadata asks for torchvision, which would replace torch; the modules we use do not.
    .venv/bin/python -m pip install -q --no-deps "torch-fidelity==0.4.0"
  fi
  .venv/bin/python -m pip install -q -e ".${extras:+[$extras]}"
  touch "$stamp"
}
