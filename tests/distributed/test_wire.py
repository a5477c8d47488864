"""The kernel's own count: two hosts, one wire, what crosses it in a training step."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOSTS = {"10.77.0.1": "modelpar-a", "10.77.0.2": "modelpar-b"}
WIRES = {"10.77.0.1": "mpwire-a", "10.77.0.2": "mpwire-b"}
STEPS = 4
BATCH = 16
BUDGET = 230_304  # B an image and direction at 224 pixels, float32

# Reads this host's counter around a few steps; the first step opens the connections.
RANK = f"""
import json, sys, torch
from torch.nn import functional
from modelpar import Column, Link, distributed
torch.set_num_threads(1)

def sent():
    for line in open("/proc/net/dev"):
        name, _, numbers = line.partition(":")
        if name.strip() == sys.argv[1]:
            return int(numbers.split()[8])

with distributed.process_mesh(2, "cpu", 60) as ranks:
    link = Link.between(ranks.pair)
    net = Column.from_recipe("code2012", link, seed=0)
    images, labels = torch.randn({BATCH}, 3, 224, 224), torch.arange({BATCH})
    for step in range({STEPS} + 1):
        ranks.gather_objects("")  # both have reached this step, and its bytes are over
        if step == 1:
            before, counted = sent(), link.bytes_sent
        functional.cross_entropy(net(images), labels).backward()
    ranks.gather_objects("")
    print(json.dumps([sent() - before, link.bytes_sent - counted]))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces joined by one wire; needs root."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    try:
        for name in HOSTS.values():
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        one, other = WIRES.values()
        ip("link", "add", one, "type", "veth", "peer", "name", other)
        for (address, name), wire in zip(HOSTS.items(), WIRES.values(), strict=True):
            ip("link", "set", wire, "netns", name)
            inside = ("-n", name)
            ip(*inside, "addr", "add", f"{address}/24", "dev", wire)
            ip(*inside, "link", "set", wire, "mtu", "65535", "up")  # headers under 0.2 %
            ip(*inside, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.usefixtures("hosts")
def test_the_kernel_counts_the_budget() -> None:
    started = []
    for rank, (address, name) in enumerate(HOSTS.items()):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": "29512",
            "GLOO_SOCKET_IFNAME": WIRES[address],
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-c", RANK, WIRES[address]],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0
        kernel, counted = json.loads(out)
        assert counted == BUDGET * BATCH * STEPS
        assert counted <= kernel
        assert kernel == pytest.approx(counted, rel=0.03)
