#!/usr/bin/env bash
# Several pairs on this machine: PAIRS=2 launch/replicas.sh data=... trains on four devices.
set -euo pipefail
pairs=${PAIRS:-2}
ranks=$((2 * pairs))
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --shutdown-timeout 120 --max-restarts "${RESTARTS:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --nproc-per-node "$ranks" -m modelpar.train "replicas=$pairs" "$@"
