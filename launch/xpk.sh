#!/usr/bin/env bash
# A run as an XPK workload on a GKE cluster with TPUs.
#   bash launch/xpk.sh create|status|logs|delete [--dry-run] [-- FLAGS of lfm_jax.main]
#
# Environment: XPK_CLUSTER, XPK_WORKLOAD, XPK_TYPE (v5p-32, v5litepod-16, v6e-256, ...), XPK_SLICES
# (default 1), XPK_ZONE, XPK_PROJECT, XPK_IMAGE (base image, default python:3.12), XPK_RESTARTS
# (default 100: how often a preempted workload is started again; each goes on from its checkpoint),
# XPK_PRIORITY (default medium), XPK_SETUP (a command before the run, e.g. a copy of the latents),
# LFM_MOUNTS (where that put them). The workdir must be in a bucket: a restarted pod has a new disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/calls.sh
read_arguments "create, status, logs, delete" "$@"
need XPK_CLUSTER XPK_WORKLOAD
where=(--cluster="$XPK_CLUSTER" ${XPK_ZONE:+--zone="$XPK_ZONE"} ${XPK_PROJECT:+--project="$XPK_PROJECT"})

case "$verb" in
  create)
    need XPK_TYPE
    need_flags
    case " ${flags[*]} " in
      *" --workdir=gs://"*) ;;
      *) fail "--workdir: expected gs://...: a pod's own disk is gone when it restarts" ;;
    esac
    # 75 (preempted, saved) is the only status worth a restart: 1 and 2 would fail again.
    command="pip install -q '.[tpu]' && ${XPK_SETUP:+$XPK_SETUP && }python -m lfm_jax.main $(printf '%q ' "${flags[@]}")"
    call xpk workload create "${where[@]}" --workload="$XPK_WORKLOAD" --tpu-type="$XPK_TYPE" \
      --num-slices="${XPK_SLICES:-1}" --base-docker-image="${XPK_IMAGE:-python:3.12}" \
      --script-dir="$PWD" --priority="${XPK_PRIORITY:-medium}" \
      --max-restarts="${XPK_RESTARTS:-100}" --restart-on-exit-codes=75 \
      --env="LFM_DISTRIBUTED=1" ${LFM_MOUNTS:+--env="LFM_MOUNTS=$LFM_MOUNTS"} --command="$command"
    ;;
  status) call xpk workload list "${where[@]}" --filter-by-job="$XPK_WORKLOAD" ;;
  logs) call kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$XPK_WORKLOAD,batch.kubernetes.io/job-completion-index=0" --all-containers --max-log-requests=16 ;;
  delete) call xpk workload delete "${where[@]}" --workload="$XPK_WORKLOAD" ;;
esac
