#!/usr/bin/env bash
# The pair on this machine, under torchrun: two GPUs, or two CPU processes.
#   launch/pair.sh data=imagenet data.root=/data/imagenet run_dir=runs/first
# RESTARTS=3 launch/pair.sh ... starts a pair that lost a process again, up to three times.
set -euo pipefail
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restarted pair must not read stale addresses
exec torchrun --standalone --shutdown-timeout 120 --max-restarts "${RESTARTS:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --nproc-per-node 2 -m modelpar.train "$@"
