# shellcheck shell=bash
# Sourced by the launchers that ask a cloud for machines: how they read their arguments and their
# environment, and the one way in which they call anything.

# Of a launcher's own name; 2 is a mistake of the user's, as in lfm_jax.main.
fail() {
  echo "$(basename "$0" .sh): $1" >&2
  exit 2
}

# read_arguments VERBS "$@": sets `verb`, `dry`, `flags` (behind --) and, where the launcher has set
# a default, `host`.
# shellcheck disable=SC2034
read_arguments() {
  local verbs="$1"
  verb="${2:-}" dry=""
  [[ -n $verb && ", $verbs, " == *", $verb, "* ]] || fail "'$verb': expected one of $verbs"
  shift 2
  while [ $# -gt 0 ]; do
    if [ "$1" = --dry-run ]; then
      dry=1
    elif [ "$1" = -- ]; then
      shift
      break
    elif [[ -n ${host:-} && $1 =~ ^[0-9]+$ ]]; then
      host="$1"
    else
      fail "$1: expected --dry-run${host:+, the number of a host} or -- before flags of lfm_jax"
    fi
    shift
  done
  flags=("$@")
}

# need NAME...: variables of the environment that must be set.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || fail "$name is unset; see the head of launch/$(basename "$0")"
  done
}

need_flags() { [ ${#flags[@]} -gt 0 ] || fail "$verb: expected flags of lfm_jax.main after --"; }

# Every command goes through here, so that --dry-run shows all of them and runs none.
call() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}
