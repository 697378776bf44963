#!/usr/bin/env bash
# Run one command as N processes on this host: a rehearsal of a pod, or one process a GPU.
#   bash launch/multiprocess.sh N [--devices=D] [--logs=DIR] [--dry-run] -- \
#     --config=configs/digits.py --workdir=runs/digits
# Process 0 writes to this terminal; every process also to DIR/process_<i>.log. Where one process
# fails the others are ended. Exit status: 75 if any process was preempted after saving, else the
# first that is not 0.
#   --devices=D   virtual CPU devices a process (CPU only); without it all devices are shared out
#   --gpus        process i sees GPU i alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

count="${1:-}"
[[ $count =~ ^[1-9][0-9]*$ ]] || { echo "multiprocess: '$count': expected a number of processes" >&2; usage; }
shift
devices="" gpus="" logs="" dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --devices=*) devices="${1#*=}" ;;
    --gpus) gpus=1 ;;
    --logs=*) logs="${1#*=}" ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) echo "multiprocess: $1: expected --devices=D, --gpus, --logs=DIR, --dry-run or -- before flags of lfm_jax.main" >&2; exit 2 ;;
  esac
  shift
done
[[ $devices =~ ^([1-9][0-9]*)?$ ]] || { echo "multiprocess: --devices=$devices: expected a number" >&2; exit 2; }
[ $# -gt 0 ] || { echo "multiprocess: expected flags of lfm_jax.main after --" >&2; exit 2; }

python="${PYTHON:-.venv/bin/python}"
free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}
[ -n "$dry" ] && port=PORT || port="$(free_port)"
[ -n "$logs" ] || logs="$(mktemp -d ${dry:+-u} -t lfm_jax.XXXXXX)"

pids=()
environment=()
for ((i = 0; i < count; i++)); do
  environment=(
    "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$i"
  )
  [ -n "$devices" ] && environment+=("JAX_PLATFORMS=cpu" "JAX_NUM_CPU_DEVICES=$devices")
  [ -n "$gpus" ] && environment+=("CUDA_VISIBLE_DEVICES=$i")
  if [ -n "$dry" ]; then
    printf '%q ' env "${environment[@]}" "$python" -m lfm_jax.main "$@"
    printf '> %q/process_%s.log\n' "$logs" "$i"
    continue
  fi
  mkdir -p "$logs"
  if [ "$i" = 0 ]; then
    env "${environment[@]}" "$python" -m lfm_jax.main "$@" \
      > >(tee "$logs/process_0.log") 2> >(tee -a "$logs/process_0.log" >&2) &
  else
    env "${environment[@]}" "$python" -m lfm_jax.main "$@" > "$logs/process_$i.log" 2>&1 &
  fi
  pids+=($!)
done
[ -z "$dry" ] || exit 0

# What a scheduler sends to this script is meant for the processes.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

status=0 killer=""
while [ ${#pids[@]} -gt 0 ]; do
  code=0 ended=""
  wait -n -p ended "${pids[@]}" || code=$?
  [ -n "$ended" ] || continue # a signal woke us, no process ended
  left=()
  for pid in "${pids[@]}"; do
    [ "$pid" = "$ended" ] || left+=("$pid")
  done
  pids=("${left[@]}")
  if [ "$code" = 75 ]; then
    status=75
  elif [ "$code" -ne 0 ]; then
    # A signal's number is no status of ours.
    [ "$status" -ne 0 ] || status=$((code > 2 ? 1 : code))
    # The others notice by themselves; where they do not, they are ended.
    if [ -z "$killer" ] && [ ${#pids[@]} -gt 0 ]; then
      (sleep "${LFM_LOST_AFTER:-60}"; kill -KILL "${pids[@]}" 2>/dev/null || true) &
      killer=$!
    fi
  fi
done
[ -z "${killer:-}" ] || kill "$killer" 2>/dev/null || true
[ "$status" = 0 ] || echo "multiprocess: exit status $status; logs in $logs" >&2
exit "$status"
