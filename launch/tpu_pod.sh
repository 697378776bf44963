#!/usr/bin/env bash
# A TPU slice through queued resources: made, set up, run on all its hosts, retried when it is
# taken away.
#   bash launch/tpu_pod.sh create|setup|run|logs|status|retry|stop|delete [--dry-run] [-- FLAGS]
#
#   create            ask for the slice and wait until it is there
#   setup             copy this checkout to every host and install it with the tpu extra
#   run -- FLAGS      start lfm_jax.main with FLAGS on every host; it goes on when you log out
#   logs [HOST]       follow the log of one host (default 0); status: state of slice and processes
#   retry -- FLAGS    create, setup and run again as often as the slice is taken away (status 75 or
#                     a slice that is gone); ends when the run ends
#   stop              end the run's processes (they save first); delete: give the slice back
#
# Environment: TPU_NAME, TPU_ZONE, TPU_TYPE (v5p-32, v5litepod-16, ...), TPU_VERSION (runtime image,
# e.g. v2-alpha-tpuv5), TPU_SPOT=1, TPU_PROJECT, TPU_SETUP (a command for every host after the
# install, e.g. a gcsfuse mount or a copy of the latents), LFM_MOUNTS (where that put them),
# TPU_NETWORK, TPU_POLL (seconds between two looks, default 60).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/calls.sh
host=0
read_arguments "create, setup, run, logs, status, retry, stop, delete" "$@"
poll="${TPU_POLL:-60}"

place() { place=(--zone="$TPU_ZONE" ${TPU_PROJECT:+--project="$TPU_PROJECT"}); }

on() { # on WORKER COMMAND: over ssh; a worker that does not answer in a minute counts as gone
  call gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --worker="$1" \
    --ssh-flag="-o ServerAliveInterval=30" --ssh-flag="-o ConnectTimeout=60" --command="$2"
}

state() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

wait_active() {
  if [ -n "$dry" ]; then
    echo "# wait until gcloud compute tpus queued-resources describe $TPU_NAME says ACTIVE"
    return
  fi
  local now
  while now="$(state)"; [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED | NONE) echo "tpu_pod: $TPU_NAME is $now" >&2; return 1 ;;
    esac
    echo "tpu_pod: $TPU_NAME is $now, waiting" >&2
    sleep "$poll"
  done
}

create() {
  need TPU_TYPE TPU_VERSION
  call gcloud compute tpus queued-resources create "$TPU_NAME" "${place[@]}" \
    --node-id="$TPU_NAME" --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_VERSION" \
    ${TPU_SPOT:+--spot} ${TPU_NETWORK:+--network="$TPU_NETWORK"}
  wait_active
}

setup() {
  local archive
  archive="$(mktemp -t lfm_jax.XXXXXX.tgz)"
  # What git tracks, as it lies here: local changes go along, runs and caches do not. Joined, since
  # bash lets go on what fails on the left of `||`, where retry calls this.
  local failed=""
  {
    call bash -c "git ls-files -z | tar --null -czf '$archive' -T -" &&
      call gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:lfm_jax.tgz" "${place[@]}" --worker=all &&
      on all "mkdir -p lfm_jax && tar xzf lfm_jax.tgz -C lfm_jax && cd lfm_jax && \
source launch/venv.sh && ensure_venv tpu${TPU_SETUP:+ && $TPU_SETUP}"
  } || failed=1
  rm -f "$archive"
  [ -z "$failed" ] || { echo "tpu_pod: setup of $TPU_NAME failed" >&2; return 1; }
}

run() {
  need_flags
  local inner
  inner=".venv/bin/python -m lfm_jax.main $(printf '%q ' "${flags[@]}"); echo \$? > run.status"
  # A log a host: --worker=all holds all output back until the command ends. The status is kept for
  # retry. The compilation cache lies on the host; a restart of the run does not compile again.
  on all "cd lfm_jax && rm -f run.status && (LFM_DISTRIBUTED=1 LFM_MOUNTS=$(printf '%q' "${LFM_MOUNTS:-}") \
JAX_COMPILATION_CACHE_DIR=\$HOME/.jax-cache nohup bash -c $(printf '%q' "$inner") \
> run.log 2>&1 < /dev/null &)"
}

status() {
  call gcloud compute tpus queued-resources describe "$TPU_NAME" "${place[@]}" --format='value(state.state)'
  on all "cd lfm_jax && (cat run.status 2>/dev/null || echo running); tail -n 1 run.log | tr '\r' '\n' | tail -n 1"
}

delete() {
  call gcloud compute tpus queued-resources delete "$TPU_NAME" "${place[@]}" --force --quiet
}

# The status that the run left on host 0; "gone" where it left none and runs no more (a host that
# was restarted), or where the slice does not answer. [l]: else pgrep finds the shell that calls it.
ended() {
  on 0 "cat lfm_jax/run.status 2>/dev/null || { pgrep -f '[l]fm_jax.main' > /dev/null && echo running; }" \
    2>/dev/null || echo gone
}

retry() {
  if [ -n "$dry" ]; then
    create
    setup
    run
    echo "# every minute: ssh to host 0 for run.status; 0, 1 or 2 ends; 75 or a slice that is gone:"
    delete
    echo "# and from the start again"
    return
  fi
  local code ready=""
  while true; do
    if [ "$(state)" != ACTIVE ]; then
      ready=""
      delete || true
      create || { sleep "$poll"; continue; }
    fi
    # A run that goes on is waited for: retry itself may have been started anew.
    if [ "$(ended)" != running ]; then
      [ -n "$ready" ] || setup || { sleep "$poll"; continue; }
      ready=1
      run || { sleep "$poll"; continue; }
    fi
    while code="$(ended)"; [ "$code" = running ]; do sleep "$poll"; done
    sleep "$poll"
    # A host that loses the others ends with 1, be it that the whole slice is being taken away.
    if [ "$code" = 1 ] && [ "$(state)" != ACTIVE ]; then code="1, and the slice is gone"; fi
    case "$code" in
      0 | 1 | 2) echo "tpu_pod: the run ended with status $code" >&2; exit "$code" ;;
      *) echo "tpu_pod: preempted ($code); again" >&2 ;;
    esac
  done
}

need TPU_NAME TPU_ZONE
place
case "$verb" in
  logs) on "$host" "tail -n 100 -F lfm_jax/run.log" ;;
  stop) on all "pkill -TERM -f '[l]fm_jax.main' || true" ;; # [l]: not the shell that calls it
  *) "$verb" ;;
esac
