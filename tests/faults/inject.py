"""Break trainings at random moments and see that nothing is lost, nothing hangs, nothing lies.

    python tests/faults/inject.py --tries 50 --seed 0 [--only kill,save] [--out table.md]

Each try starts the real command, does its harm from outside, and compares what the run ends with,
bit for bit, with a run that nobody disturbed.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from modelpar.training import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

from collections.abc import Callable
from typing import TextIO

from unit.test_bad_input import DATA, WORDS

from modelpar.errors import CheckpointError

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 30, 5  # three epochs of ten steps, an evaluation after each
HANG = 240.0  # s after which a run counts as hung
TIMEOUT = 8  # comm.timeout where a process is stopped or cut off
ONE_LINE = 10.0  # s within which wrong input should be told, on a busy machine too
TOGETHER = 5  # tries at once: most of the time is waiting
HOW = [
    "data=imagefolder",
    "model.image_size=64",
    "batch_size=8",
    "workers=0",
    "compile=false",
    f"steps={STEPS}",
    f"checkpoint_every={EVERY}",
    "monitor.progress=false",
    "monitor.tensorboard=false",
]
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass
class Kind:
    """One kind of fault and what came of its tries."""

    name: str
    tries: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)  # steps done again
    noticed: list[float] = field(default_factory=list)  # s until the others knew
    goodput: list[float] = field(default_factory=list)  # time undisturbed / time it took
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str = "") -> None:
        """Count one try."""
        self.tries += 1
        self.survived += not failure
        if failure:
            self.failures.append(failure)
            print(f"  {self.name}: {failure}", flush=True)

    def row(self) -> str:
        """Return the row of the table."""

        def both(values: list[float], digits: int) -> str:
            if not values:
                return ""
            return f"{statistics.median(values):.{digits}f}, {max(values):.{digits}f}"

        good = f"{100 * statistics.mean(self.goodput):.0f} %" if self.goodput else ""
        lost = both([float(one) for one in self.lost], 0)
        return (
            f"| {self.name} | {self.tries} | {self.survived} | {lost} "
            f"| {both(self.noticed, 1)} | {good} |"
        )


HEADER = (
    "| fault | tries | survived | steps done again: median, most "
    "| noticed after, s: median, most | goodput |\n|---|---|---|---|---|---|"
)


class Run:
    """A training as a user starts it, through either door."""

    def __init__(
        self, place: Path, name: str, *words: str, torchrun: int | None = None, under: str = ""
    ) -> None:
        self.run_dir = place / name
        self.log = place / f"{name}.log"
        launcher = [sys.executable, "-m", "modelpar.train"]
        if torchrun is not None:
            flags = ["--standalone", "--max-restarts", str(torchrun), "--shutdown-timeout", "120"]
            flags += ["--signals-to-handle", SIGNALS, "--nproc-per-node", "2"]
            launcher = [sys.executable, "-m", "torch.distributed.run", *flags]
            launcher += ["-m", "modelpar.train"]
        command = [*launcher, *HOW, f"data.root={place / 'images'}", f"run_dir={self.run_dir}"]
        command += words
        if under:
            script = under.replace("COMMAND", " ".join(f"'{word}'" for word in command))
            command = ["unshare", "-m", "sh", "-c", script]
        self.began = time.monotonic()
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, **_how(place, log))

    def ranks(self) -> list[int]:
        """Return the processes of the ranks that are there now."""
        found = []
        for child in _children(self.process.pid):
            with suppress(OSError):
                words = Path(f"/proc/{child}/cmdline").read_text()
                if "spawn_main" in words or "modelpar.train" in words:
                    found.append(child)
        return sorted(found)

    def step(self) -> int:
        """Return the step of the last row."""
        with suppress(OSError, IndexError, ValueError):
            last = (self.run_dir / "metrics.jsonl").read_text().splitlines()[-1]
            return int(last.partition('"step": ')[2].partition(",")[0])
        return 0

    def saved(self) -> int:
        """Return the newest checkpoint's step, 0 for none."""
        names = [path.name for path in (self.run_dir / "checkpoints").glob("step-*")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def saving(self) -> bool:
        """Whether a save is under way."""
        return any((self.run_dir / "checkpoints").glob(".tmp-*"))

    def until(self, what: Callable[[], bool], within: float = HANG) -> bool:
        """Wait until ``what`` is so; False where the run ended or it took too long."""
        deadline = time.monotonic() + within
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def end(self) -> int | None:
        """Wait for the end; return the exit status, None for a hang, which is ended."""
        try:
            return self.process.wait(max(1.0, self.began + HANG - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """End everything of this run at once."""
        for child in [*_children(self.process.pid, deep=True), self.process.pid]:
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        self.process.wait()

    def lines(self) -> list[str]:
        """Return what it said on stderr in its own name."""
        said = self.log.read_text().splitlines()
        return [line for line in said if line.startswith("modelpar: ")]


def _how(place: Path, log: TextIO | int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    return {"cwd": place, "env": environment, "stdout": log, "stderr": log}


def _children(of: int, *, deep: bool = False) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            number, _, rest = status.read_text().partition(" ")
            if int(rest.rpartition(")")[2].split()[1]) == of:
                found.append(int(number))
    return found + ([one for child in found for one in _children(child, deep=True)] * deep)


def alive(number: int) -> bool:
    """Whether the process runs, and is no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def hashes(run_dir: Path) -> dict[str, str]:
    """Verify every file of the newest checkpoint; return step and hashes."""
    found = checkpoint.newest(run_dir)
    if found is None:
        return {}
    for name, told in found.manifest["files"].items():
        checkpoint.read_tensors(found.folder / name, told)
    told = {name: one["sha256"] for name, one in found.manifest["files"].items()}
    return {"step": str(found.step), **told}


class Harm:
    """All tries of all kinds, in one folder."""

    def __init__(self, place: Path, tries: int, seed: int) -> None:
        self.place, self.tries = place, tries
        self.seed = seed
        self.random = random.Random(seed)
        _images(place / "images")
        first = Run(place, "first")  # measures the mean image
        assert first.end() == 0, first.log.read_text()
        once = Run(place, "once")
        assert once.end() == 0, once.log.read_text()
        self.time = time.monotonic() - once.began
        self.expected = hashes(once.run_dir)
        assert self.expected == hashes(first.run_dir), "two runs are not the same run"

    def judge(self, run: Run, code: int | None) -> str:
        """Return what is wrong with how a run ended that should have ended well."""
        if code is None:
            return f"{run.run_dir.name}: hung"
        if code != 0:
            return f"{run.run_dir.name}: ended with {code}: {run.lines()[-1:]}"
        try:
            ended = hashes(run.run_dir)
        except CheckpointError as error:
            return str(error)
        rows = (run.run_dir / "metrics.jsonl").read_text()
        twice = any(rows.count(f'"train", "step": {step},') != 1 for step in range(1, STEPS + 1))
        if twice:
            return f"{run.run_dir.name}: a step stands in metrics.jsonl twice, or not at all"
        return "" if ended == self.expected else f"{run.run_dir.name}: other weights"

    def together(self, one: Callable[[int, random.Random], None]) -> None:
        """Do the tries, several at a time, each with its own draws."""
        draws = [random.Random(f"{self.seed} {one.__qualname__} {n}") for n in range(self.tries)]
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(one, range(self.tries), draws))

    # -- killed, and started again by itself --

    def kill(self) -> Kind:
        """SIGKILL either rank at any moment, from its first import to its last save."""
        return self._killed(Kind("a rank killed, at any moment"), in_save=False)

    def save(self) -> Kind:
        """SIGKILL either rank, or both, inside a save."""
        return self._killed(Kind("a rank, or both, killed inside a save"), in_save=True)

    def _killed(self, kind: Kind, *, in_save: bool) -> Kind:
        number = 0
        while kind.tries < self.tries:
            number += 1
            door = None if number % 2 else 99  # by turns: our own door, torchrun's
            words = ["checkpoint_every=2"] if in_save else []
            words += ["restarts=99"] if door is None else []
            name = f"{'save' if in_save else 'kill'}-{number}"
            run = Run(self.place, name, *words, torchrun=door)
            done = 0
            before, wrong = 0, ""
            while kind.tries + done < self.tries:
                if not run.until(lambda run=run: len(run.ranks()) == 2):
                    break
                if in_save and not self._inside_a_save(run):
                    break
                if not in_save:
                    time.sleep(self.random.uniform(0, self.time))
                ranks = run.ranks()
                if len(ranks) != 2 or run.process.poll() is not None:
                    break
                both = in_save and self.random.random() < 1 / 3
                step, doomed = run.step(), ranks if both else [self.random.choice(ranks)]
                when = time.monotonic()
                for one in doomed:
                    os.kill(one, signal.SIGKILL)
                done += 1
                if run.until(lambda ranks=ranks: not any(map(alive, ranks)), 60):
                    kind.noticed.append(time.monotonic() - when)
                try:
                    newest = int(hashes(run.run_dir).get("step", 0))  # reads and verifies it all
                    wrong = wrong or (f"{name}: fell back" if newest < before else "")
                    kind.lost.append(max(0, step - newest))
                    before = newest
                except CheckpointError as error:
                    wrong = wrong or str(error)
            code = run.end()
            wrong = wrong or self.judge(run, code)
            if done:
                kind.goodput.append(min(1.0, self.time / (time.monotonic() - run.began)))
            for _ in range(done):
                kind.add(wrong)
                wrong = ""
            if wrong:
                kind.failures.append(wrong)
            shutil.rmtree(run.run_dir, ignore_errors=True)
        return kind

    def _inside_a_save(self, run: Run) -> bool:
        for _ in range(self.random.randint(1, 3)):
            if not run.until(lambda: not run.saving()) or not run.until(run.saving):
                return False
        time.sleep(self.random.uniform(0, 0.6))
        return True

    # -- asked to stop, and started again by hand --

    def stop(self) -> Kind:
        """SIGTERM, SIGINT or SIGUSR1 to the launcher, to one rank, or to all."""
        kind = Kind("asked to stop, by TERM, INT or USR1")

        def one(number: int, draw: random.Random) -> None:
            run = Run(self.place, f"stop-{number}", torchrun=0 if number % 2 else None)
            run.until(lambda: run.step() > 0)
            time.sleep(draw.uniform(0, self.time / 3))
            asked = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            who = draw.choice(["launcher", "rank", "all"])
            ranks = run.ranks()
            whom = {"launcher": [run.process.pid], "rank": ranks[:1]}.get(
                who, [run.process.pid, *ranks]
            )
            step, when = run.step(), time.monotonic()
            for one in whom:
                with suppress(OSError):
                    os.kill(one, asked)
            code = run.end()
            kind.noticed.append(time.monotonic() - when)
            own = 75 if number % 2 == 0 else 1  # torchrun flattens every status to 1
            if code not in {0, own}:
                kind.add(f"{run.run_dir.name}: {asked.name} to {who}: status {code}")
                return
            kind.lost.append(max(0, step - run.saved()))
            self._goes_on(kind, run)

        self.together(one)
        return kind

    def _goes_on(self, kind: Kind, run: Run) -> None:
        """Start the run again, as its user would; count the try."""
        again = Run(self.place, run.run_dir.name, f"workers={self.random.randint(0, 1)}")
        kind.add(self.judge(again, again.end()))
        shutil.rmtree(run.run_dir, ignore_errors=True)

    # -- a process that does not answer --

    def stopped(self) -> Kind:
        """SIGSTOP either rank: it lives, and does not answer."""
        kind = Kind(f"a rank stopped, comm.timeout={TIMEOUT}")

        def one(number: int, draw: random.Random) -> None:
            run = Run(self.place, f"stopped-{number}", f"comm.timeout={TIMEOUT}")
            run.until(lambda: run.step() > 0)
            time.sleep(draw.uniform(0, self.time / 3))
            ranks = run.ranks()
            if len(ranks) != 2:
                self._goes_on(kind, run)
                return
            step, still = run.step(), draw.choice(ranks)
            when = time.monotonic()
            os.kill(still, signal.SIGSTOP)
            code = run.end()
            kind.noticed.append(time.monotonic() - when)
            left = [rank for rank in ranks if alive(rank)]
            if code != 6 or left or len(run.lines()) != 2:  # the first line says what it runs on
                said = f"status {code}, left {left}, said {run.lines()[1:]}"
                kind.add(f"{run.run_dir.name}: {said}")
                return
            kind.lost.append(max(0, step - run.saved()))
            self._goes_on(kind, run)

        self.together(one)
        return kind

    def cut(self) -> Kind:
        """Take down the wire between two hosts (network namespaces: root)."""
        kind = Kind(f"the wire cut, comm.timeout={TIMEOUT}")
        if os.geteuid() != 0 or shutil.which("ip") is None:
            print("  the wire cut: needs root and iproute2, left out")
            return kind

        def one(number: int, draw: random.Random) -> None:
            with _Wire(self.place, f"cut-{number}", number) as wire:
                if not wire.until(lambda: wire.run.step() > 0):
                    kind.add(f"{wire.name}: did not start: {wire.lines()}")
                    return
                time.sleep(draw.uniform(0, self.time / 3))
                step, when = wire.run.step(), time.monotonic()
                wire.cut()
                codes = wire.end()
                kind.noticed.append(time.monotonic() - when)
                kind.lost.append(max(0, step - wire.run.saved()))
                if None in codes:
                    kind.add(f"{wire.name}: hung")
                    return
            self._goes_on(kind, wire.run)

        self.together(one)
        return kind

    def launcher(self) -> Kind:
        """SIGKILL the launcher: its ranks must not live on."""
        kind = Kind("the launcher killed")

        def one(number: int, draw: random.Random) -> None:
            run = Run(self.place, f"launcher-{number}", torchrun=0 if number % 2 else None)
            run.until(lambda: len(run.ranks()) == 2)
            time.sleep(draw.uniform(0, self.time))
            ranks, step, when = run.ranks(), run.step(), time.monotonic()
            run.process.kill()
            run.process.wait()
            while any(map(alive, ranks)) and time.monotonic() < when + 60:
                time.sleep(0.05)
            if any(map(alive, ranks)):
                kind.add(f"{run.run_dir.name}: orphans")
                return
            kind.noticed.append(time.monotonic() - when)
            kind.lost.append(max(0, step - run.saved()))
            self._goes_on(kind, run)

        self.together(one)
        return kind

    # -- disks and files --

    def disk(self) -> Kind:
        """A disk that fills up between saves, or inside one (tmpfs: root)."""
        kind = Kind("the disk full")
        if os.geteuid() != 0:
            print("  the disk full: needs root, left out")
            return kind

        def one(number: int, draw: random.Random) -> None:
            disk, out = self.place / f"disk-{number}", self.place / f"left-{number}"
            disk.mkdir()
            size = draw.randint(200, 560)  # MB; a checkpoint here has 162
            wait = draw.uniform(0, 0.5)
            fill = (
                f"(until ls {disk}/run/checkpoints/.tmp-* >/dev/null 2>&1; do sleep .02; done; "
                f"sleep {wait:.2f}; dd if=/dev/zero of={disk}/fill bs=1M >/dev/null 2>&1) & "
            )
            script = (
                f"mount -t tmpfs -o size={size}m none {disk}; {fill if number % 2 else ''}"
                f"COMMAND; code=$?; rm -f {disk}/fill; mkdir {out}; cp -r {disk}/run {out}/; "
                "exit $code"
            )
            words = ["checkpoint_every=4", f"monitor.tensorboard={str(number % 3 == 0).lower()}"]
            run = Run(self.place, f"disk-{number}/run", *words, under=script)
            code = run.end()
            run.run_dir = out / "run"
            if code not in {0, 4} or (code == 4 and len(run.lines()) != 2):
                kind.add(f"disk-{number}: status {code}, said {run.lines()}")
            elif code == 4 and not run.run_dir.is_dir():
                kind.add()  # refused before anything was made
            else:
                kind.add(self._whole(run) or self._room_again(number))
            shutil.rmtree(out, ignore_errors=True)

        self.together(one)
        return kind

    def _whole(self, run: Run) -> str:
        try:
            hashes(run.run_dir)
        except CheckpointError as error:
            return str(error)
        return ""

    def _room_again(self, number: int) -> str:
        again = Run(self.place, f"left-{number}/run", "checkpoint_every=4")
        return self.judge(again, again.end())

    def flip(self) -> Kind:
        """One bit of each file of a checkpoint, at a random place."""
        kind = Kind("one bit of a checkpoint's file flipped")
        source = self.place / "once"
        (newest,) = sorted((source / "checkpoints").glob("step-*"))[-1:]
        names = sorted(path.name for path in newest.iterdir())
        for number in range(max(self.tries, len(names))):  # each file at least once
            name = names[number % len(names)]
            place = self.place / "flipped"
            shutil.copytree(source, place, copy_function=os.link)
            path = place / "checkpoints" / newest.name / name
            content = bytearray(path.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.unlink()
            path.write_bytes(content)
            run = Run(self.place, "flipped", f"steps={STEPS + 1}")
            code, said = run.end(), " ".join(run.lines())
            run.log.unlink()
            named = code == 4 and name in said and "goes on from step-000000" in said
            kind.add("" if named else f"{name}: status {code}, said {said}")
            shutil.rmtree(place)
        return kind

    def input(self) -> Kind:
        """Wrong settings and images, as real commands: one line, at once, nothing touched."""
        kind = Kind("wrong settings or images")
        rows = [(name, words, None, code, said) for name, words, code, said in WORDS]
        rows += [(name, [], spoil, 3, said) for name, spoil, said in DATA]
        for name, words, spoil, code, said in self.random.sample(rows, min(self.tries, len(rows))):
            place = self.place / "input"
            (place / "run").mkdir(parents=True)
            shutil.copytree(self.place / "images", place / "images", copy_function=os.link)
            shutil.copytree(
                self.place / "once", place / "run", copy_function=os.link, dirs_exist_ok=True
            )
            if spoil:
                spoil(place)
            held = {os.fsencode(path): path.lstat().st_mtime_ns for path in place.rglob("*")}
            began = time.monotonic()
            base = [*HOW, "data.root=images", *(["run_dir=run"] if spoil else [])]
            done = subprocess.run(
                [sys.executable, "-m", "modelpar.train", *base, *words],
                **{
                    **_how(place, subprocess.PIPE),
                    "stdout": subprocess.PIPE,
                    "stderr": subprocess.PIPE,
                },
                check=False,
            )
            took = time.monotonic() - began
            kind.noticed.append(took)
            if took > ONE_LINE:
                print(f"  {name}: {took:.1f} s")
            now = {os.fsencode(path): path.lstat().st_mtime_ns for path in place.rglob("*")}
            lines = done.stderr.decode(errors="replace").splitlines()
            fine = (
                done.returncode == code and len(lines) == 1 and said.partition(":")[0] in lines[0]
            )
            now = {key: value for key, value in now.items() if b"/cache" not in key}
            kind.add("" if fine and now == held else f"{name}: {done.returncode}, {lines}")
            shutil.rmtree(place)
        return kind


class _Wire:
    """The two columns on two hosts made of network namespaces, one torchrun on each."""

    def __init__(self, place: Path, name: str, number: int) -> None:
        self.place, self.name = place, name
        self.hosts = [f"faults-{os.getpid()}-{number}-{side}" for side in (0, 1)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.run = Run.__new__(Run)
        self.run.run_dir, self.run.log = place / name, place / f"{name}.log"

    def __enter__(self) -> Self:
        one, other = self.hosts
        for host in self.hosts:
            _ip("netns", "add", host)
        _ip(
            "link",
            "add",
            "wire",
            "netns",
            one,
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            other,
        )
        for side, host in enumerate(self.hosts):
            _ip("-n", host, "address", "add", f"10.79.0.{side + 1}/24", "dev", "wire")
            _ip("-n", host, "link", "set", "wire", "up")
            _ip("-n", host, "link", "set", "lo", "up")
        for side, host in enumerate(self.hosts):
            flags = ["--nnodes", "2", "--node-rank", str(side), "--nproc-per-node", "1"]
            flags += ["--master-addr", "10.79.0.1", "--master-port", "29513"]
            words = [f"data.root={self.place / 'images'}", f"run_dir={self.run.run_dir}"]
            with self.run.log.open("a") as log:
                how = _how(self.place, log)
                how["env"] = {**how["env"], "GLOO_SOCKET_IFNAME": "wire"}
                command = ["ip", "netns", "exec", host, sys.executable, "-m"]
                command += ["torch.distributed.run", *flags, "-m", "modelpar.train"]
                command += [*HOW, *words, f"comm.timeout={TIMEOUT}"]
                self.processes.append(subprocess.Popen(command, **how))
        self.began = time.monotonic()
        return self

    def until(self, what: Callable[[], bool]) -> bool:
        while not what():
            if any(one.poll() is not None for one in self.processes):
                return False
            if time.monotonic() > self.began + HANG:
                return False
            time.sleep(0.02)
        return True

    def cut(self) -> None:
        _ip("-n", self.hosts[0], "link", "set", "wire", "down")

    def lines(self) -> list[str]:
        return self.run.log.read_text().splitlines()[-3:]

    def end(self) -> list[int | None]:
        codes: list[int | None] = []
        for process in self.processes:
            try:
                codes.append(process.wait(HANG))
            except subprocess.TimeoutExpired:
                codes.append(None)
        return codes

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            for child in [*_children(process.pid, deep=True), process.pid]:
                with suppress(OSError):
                    os.kill(child, signal.SIGKILL)
        for host in self.hosts:
            _ip("netns", "del", host)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _images(root: Path) -> None:
    """Eighty training images of two classes: ten steps of eight an epoch."""
    source = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("val", 10)):
        for label, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 128, (80, 80, 3), dtype=torch.uint8, generator=source)
                path = root / part / name / f"{number}.png"
                Image.fromarray((noise + 100 * label).numpy()).save(path)


KINDS = ("kill", "save", "stop", "stopped", "cut", "launcher", "disk", "flip", "input")


def inject(tries: int, seed: int, only: list[str]) -> list[Kind]:
    """Do ``tries`` of each kind of fault; return what came of them."""
    with tempfile.TemporaryDirectory() as folder:
        harm = Harm(Path(folder), tries, seed)
        print(f"a run of {STEPS} steps, saved every {EVERY}: {harm.time:.1f} s; seed {seed}")
        kinds = []
        for name in only:
            began = time.monotonic()
            kinds.append(getattr(harm, name)())
            print(f"{kinds[-1].row()} in {time.monotonic() - began:.0f} s", flush=True)
        return kinds


def main() -> None:
    """Run from the command line; end with 1 where a try was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    kinds = inject(told.tries, told.seed, told.only.split(","))
    table = "\n".join([HEADER, *(kind.row() for kind in kinds if kind.tries)])
    print(table)
    if told.out:
        told.out.write_text(table + "\n")
    sys.exit(any(kind.failures for kind in kinds))


if __name__ == "__main__":
    main()
