#!/usr/bin/env bash
# Two processes in two network namespaces, joined by a link of the given rate in Mbit/s (root, iproute2):
#   launch/slow_link.sh 1000 modelpar.train data=synthetic steps=20 run_dir=runs/slow
#   launch/slow_link.sh 100,1000,10000 modelpar.benchmark contenders=[ddp,in_turn,pair]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
rates=$1 main=$2
shift 2
if [ "$EUID" != 0 ] || ! command -v ip > /dev/null || ! command -v tc > /dev/null; then
  echo "modelpar: launch/slow_link.sh needs root, and ip and tc of iproute2" >&2
  exit 5
fi
hosts=("modelpar-$$-0" "modelpar-$$-1")
end() {
  kill $(jobs -p) 2> /dev/null || true
  for host in "${hosts[@]}"; do ip netns del "$host" 2> /dev/null || true; done
}
trap end EXIT
for host in "${hosts[@]}"; do ip netns add "$host"; done
ip link add wire netns "${hosts[0]}" type veth peer name wire netns "${hosts[1]}"
for number in 0 1; do
  ip -n "${hosts[number]}" address add "10.78.0.$((number + 1))/24" dev wire
  ip -n "${hosts[number]}" link set wire up
  ip -n "${hosts[number]}" link set lo up
done
export MASTER_ADDR=10.78.0.1 GLOO_SOCKET_IFNAME=wire TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ "$main" = modelpar.benchmark ]; then # it sets the rates itself, one after another
  python -m "$main" "link.hosts=[${hosts[0]},${hosts[1]}]" "link.rates=[$rates]" "$@"
  exit
fi
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[ -n "$(trap -p SIGHUP)" ] || signals+=,SIGHUP # nohup ignores it, and so must torchrun
cores=$(nproc)
for number in 1 0; do
  host=${hosts[number]}
  tc -n "$host" qdisc replace dev wire root tbf rate "${rates}mbit" latency 50ms \
    burst $((rates > 500 ? rates * 250 : 131072)) # 2 ms at that rate, two large segments at least
  ip netns exec "$host" torchrun --nnodes 2 --node-rank "$number" --nproc-per-node 1 \
    --master-addr "$MASTER_ADDR" --master-port 29512 \
    --signals-to-handle "$signals" -m "$main" \
    "threads=$((cores > 1 ? cores / 2 : 1))" "$@" &
  last=$!
done
wait "$last"
