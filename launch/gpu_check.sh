#!/usr/bin/env bash
# The GPU tests, the benchmark and a training on photos, in at most seven minutes, without a network:
#   launch/gpu_check.sh REPORT [WHEELS]
# REPORT is the text file to write.  WHEELS is a folder of wheels that this machine lacks; they are
# installed for this check only.  PYTHON=... chooses another interpreter than python3.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
report=$(realpath -m "$1") wheels=${2:+$(realpath -m "$2")}
export python=${PYTHON:-python3}
seen='import torch; raise SystemExit(not torch.cuda.is_available())'
if ! timeout 25 "$python" -c "$seen" > /dev/null 2>&1; then
  echo "modelpar: launch/gpu_check.sh needs a GPU, and torch in $python finds none" >&2
  exit 5
fi
if ! { : > "$report"; } 2> /dev/null; then
  echo "modelpar: $report: cannot be written; choose another file" >&2
  exit 2
fi
cd "$(dirname "$0")/.." || exit
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$scratch/packages:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export XDG_CACHE_HOME="$scratch/cache"
summary="" failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status=0 outcome=passed
  shift 2
  printf '\n== %s, at most %s s: %s\n' "$name" "$limit" "$*"
  timeout --signal INT --kill-after 3 "$limit" "$@" || status=$? # pytest still prints failures
  if [ "$status" != 0 ]; then
    outcome="failed with status $status" failed=1
    [ "$status" != 124 ] && [ "$status" != 137 ] || outcome="failed, it took too long"
  fi
  summary+="$name: $outcome, $((SECONDS - begin)) s"$'\n'
}

versions() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
    head -n 1 /proc/driver/nvidia/version
  git log -1 --format='commit %h' 2> /dev/null
  "$python" - << 'PY'
import importlib, platform, torch
try:
    triton = importlib.import_module("triton").__version__
except ImportError:
    triton = "none"
print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
print(f"triton {triton}, NCCL {torch.cuda.nccl.version()}, CUDA {torch.version.cuda}")
print(f"cuDNN {torch.backends.cudnn.version()}, Python {platform.python_version()}")
PY
}
export -f versions

{
  part versions 10 bash -c versions
  if [ -n "$wheels" ]; then
    part wheels 10 "$python" -m pip install --quiet --no-index --no-deps \
      --target "$scratch/packages" "$wheels"/*.whl
  fi
  part tests 180 "$python" -m pytest -m gpu -n 8 -vv -rap --durations 20 \
    -p no:cacheprovider tests/gpu
  part benchmark 120 "$python" -m modelpar.benchmark recipe=paper "out=$scratch/benchmark"
  part training 60 "$python" -m modelpar.train columns=1 device=cuda precision=bfloat16 \
    monitor.progress=false "run_dir=$scratch/run"
  tail -n 12 "$scratch/run/metrics.jsonl"
} >> "$report" 2>&1 # no pipe: a process that outlives its part would keep it open
printf '\n== summary\n%s' "$summary" | tee -a "$report"
exit "$failed"
