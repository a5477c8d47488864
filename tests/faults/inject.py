"""Inject faults into training runs at random moments: nothing may be lost, and nothing may hang.

    python tests/faults/inject.py --tries 20 --seed 0 [--only kill,save] [--out table.md]

Each try starts the real command and causes one fault from outside. The run then continues, by
itself or started again. Its last checkpoint must equal that of an undisturbed run bit for bit.
"""

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from catalogue import IMAGES, SETTINGS, contents, write_images
from processes import children, send, still_alive

from modelpar.errors import CheckpointError
from modelpar.training import checkpoint

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 30, 5  # three epochs of ten steps, each followed by an evaluation
HUNG_AFTER = 240.0  # s from the start of a run
TIMEOUT = 8  # s, comm.timeout in runs with a stopped process or a cut link
SLOW_ERROR = 10.0  # s; a bad input that takes longer to be reported is printed
PARALLEL_TRIES = 5  # a run waits most of the time
TRAIN = (
    "data=imagefolder model.image_size=64 batch_size=8 workers=0 threads=1 compile=false "
    f"steps={STEPS} checkpoint_every={EVERY} monitor.progress=false monitor.tensorboard=false"
).split()
LAUNCHER = [sys.executable, "-m", "modelpar.train"]
TORCHRUN = [
    *("torchrun", "--standalone", "--nproc-per-node=2"),
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # as in launch/slow_link.sh
    *("-m", "modelpar.train"),
]
TWO_HOSTS = ["bash", str(ROOT / "launch/slow_link.sh"), "10000", "modelpar.train"]


@dataclass
class Fault:
    """One kind of fault and the outcome of its tries."""

    name: str
    tries: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)  # steps that were trained again
    noticed: list[float] = field(default_factory=list)  # s until the other processes reacted
    goodput: list[float] = field(default_factory=list)  # undisturbed time / time with faults
    failures: list[str] = field(default_factory=list)

    def add(self, failure: str = "") -> None:
        """Count one try, which survived unless ``failure`` describes what went wrong."""
        self.tries += 1
        self.survived += not failure
        if failure:
            self.failures.append(failure)
            print(f"  {self.name}: {failure}", flush=True)

    def row(self) -> str:
        """Return the row of the table."""

        def median_and_max(values: list[float] | list[int], digits: int) -> str:
            shown = (statistics.median(values), max(values)) if values else ()
            return ", ".join(f"{value:.{digits}f}" for value in shown)

        lost, noticed = median_and_max(self.lost, 0), median_and_max(self.noticed, 1)
        goodput = f"{100 * statistics.mean(self.goodput):.0f} %" if self.goodput else ""
        return f"| {self.name} | {self.tries} | {self.survived} | {lost} | {noticed} | {goodput} |"


HEADER = (
    "| fault | tries | survived | steps done again: median, most "
    "| noticed after, s: median, most | goodput |\n|---|---|---|---|---|---|"
)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of the commands: this Python's programs, one cache for all runs."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


class Run:
    """A training run that is started as a user starts it.

    ``script`` is a shell script for its own mount namespace; COMMAND stands for the command.
    """

    def __init__(
        self, folder: Path, name: str, *words: str, start: list[str] = LAUNCHER, script: str = ""
    ) -> None:
        self.name, self.run_dir, self.log = name, folder / name, folder / f"{name}.log"
        self.error_log = folder / f"{name}.errors.log"
        paths = [f"data.root={folder / 'images'}", f"run_dir={self.run_dir}"]
        command = [*start, *TRAIN, *paths, *words]
        if script:
            quoted = " ".join(f"'{word}'" for word in command)
            command = ["unshare", "-m", "sh", "-c", script.replace("COMMAND", quoted)]
        self.began = time.monotonic()
        with self.log.open("a") as log, self.error_log.open("a") as errors:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment(folder), stdout=log, stderr=errors
            )

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks that exist now."""
        found = []
        for child in children(self.process.pid):
            with suppress(OSError):
                if "modelpar.train" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(child)
        return sorted(found)

    def step(self) -> int:
        """Return the step of the last row of metrics.jsonl, 0 without one."""
        with suppress(OSError, IndexError, ValueError):
            last = (self.run_dir / "metrics.jsonl").read_text().splitlines()[-1]
            return int(last.partition('"step": ')[2].partition(",")[0])
        return 0

    def saved(self) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        names = [path.name for path in (self.run_dir / "checkpoints").glob("step-*")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        return any((self.run_dir / "checkpoints").glob(".tmp-*"))

    def wait_until(self, condition: Callable[[], bool], seconds: float = HUNG_AFTER) -> bool:
        """Wait for a condition; return False if the run ended before or it took too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def wait(self) -> int | None:
        """Wait for the end; return the exit status, or None for a hung run, which is killed."""
        try:
            return self.process.wait(max(1.0, self.began + HUNG_AFTER - time.monotonic()))
        except subprocess.TimeoutExpired:
            for child in [*children(self.process.pid, deep=True), self.process.pid]:
                send(signal.SIGKILL, child)
            self.process.wait()
            return None

    def errors(self) -> list[str]:
        """Return the lines that modelpar itself printed to standard error."""
        text = self.error_log.read_text()
        return [line for line in text.splitlines() if line.startswith("modelpar: ")]


def is_root(fault: Fault, program: str) -> bool:
    """Return whether this is root and has the program; print that the fault is left out if not."""
    if os.geteuid() == 0 and shutil.which(program):
        return True
    print(f"  {fault.name}: left out, it needs root and {program}")
    return False


def verify(run_dir: Path) -> tuple[int, dict[str, str], str]:
    """Return the newest checkpoint's step, the hash of each of its files, and its damage.

    Reads every file. The step is 0 without a checkpoint; an empty text means no damage.
    """
    try:
        newest = checkpoint.newest(run_dir)
        files = newest.manifest["files"] if newest else {}
        for name, entry in files.items():
            checkpoint.read_tensors(newest.folder / name, entry)
    except CheckpointError as error:
        return 0, {}, str(error)
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    return newest.step if newest else 0, hashes, ""


class Injector:
    """All faults, on runs in one folder. The public methods are the kinds of faults."""

    def __init__(self, folder: Path, tries: int, seed: int) -> None:
        self.folder, self.tries, self.seed = folder, tries, seed
        self.random = random.Random(seed)
        write_images(folder / "images", train=40, val=10)
        first = Run(folder, "first")  # also measures the mean image
        assert (status := first.wait()) == 0, (status, first.errors())
        reference = Run(folder, "reference")
        assert (status := reference.wait()) == 0, (status, reference.errors())
        self.seconds = time.monotonic() - reference.began
        self.expected = verify(reference.run_dir)
        assert self.expected == verify(first.run_dir), "two undisturbed runs differ"

    def verdict(self, run: Run, status: int | None) -> str:
        """Return what is wrong with a run that should have finished, an empty text if nothing."""
        if status is None:
            return f"{run.name}: hung"
        if status != 0:
            return f"{run.name}: exit status {status}: {run.errors()[-1:]}"
        ended = verify(run.run_dir)
        rows = (run.run_dir / "metrics.jsonl").read_text()
        if any(rows.count(f'"train", "step": {step},') != 1 for step in range(1, STEPS + 1)):
            return f"{run.name}: metrics.jsonl has a step twice, or lacks one"
        same = ended == self.expected
        return "" if same else f"{run.name}: not the undisturbed run's weights: {ended}"

    def in_parallel(self, fault: Fault, attempt: Callable[[int, random.Random], str]) -> Fault:
        """Make the tries of one fault, several at a time, each with its own random numbers.

        Each attempt returns what went wrong, an empty text if nothing did.
        """
        draws = [random.Random(f"{self.seed} {fault.name} {n}") for n in range(self.tries)]
        with ThreadPoolExecutor(PARALLEL_TRIES) as pool:
            for wrong in pool.map(attempt, range(self.tries), draws):
                fault.add(wrong)
        return fault

    def pause(self, draw: random.Random, run: Run) -> None:
        """Wait for the first step, then for a random time."""
        run.wait_until(lambda: run.step() > 0)
        time.sleep(draw.uniform(0, self.seconds / 3))

    def resume(self, fault: Fault, run: Run, step: int) -> str:
        """Start a run that ended after ``step`` again, as its user would; return the verdict."""
        fault.lost.append(max(0, step - run.saved()))
        again = Run(self.folder, run.name, f"workers={step % 2}")
        verdict = self.verdict(again, again.wait())
        shutil.rmtree(run.run_dir, ignore_errors=True)
        return verdict

    # -- killed ranks; the run restarts by itself --

    def kill(self) -> Fault:
        """Send SIGKILL to a rank at any moment, from its first import to its last save."""
        return self._kill_ranks(Fault("a rank killed, at any moment"), during_save=False)

    def save(self) -> Fault:
        """Send SIGKILL to one rank or both during a save."""
        return self._kill_ranks(Fault("a rank, or both, killed inside a save"), during_save=True)

    def _kill_ranks(self, fault: Fault, *, during_save: bool) -> Fault:
        """Kill ranks of one run after another; each run is killed until it finishes."""
        number = 0
        while fault.tries < self.tries:
            number += 1
            name = f"{'save' if during_save else 'kill'}-{number}"
            settings = [f"checkpoint_every={2 if during_save else EVERY}"]
            if number % 2:  # the launcher and torchrun in turn
                run = Run(self.folder, name, *settings, "restarts=99")
            else:
                again = [TORCHRUN[0], "--max-restarts=99", *TORCHRUN[1:]]
                run = Run(self.folder, name, *settings, start=again)
            kills, newest, wrong = 0, 0, ""
            while fault.tries + kills < self.tries:
                killed_at = self._kill_once(run, fault, during_save=during_save)
                if killed_at is None:
                    break
                kills += 1
                step, _, damage = verify(run.run_dir)
                lost = f"{name}: a checkpoint was lost" if step < newest else ""
                wrong = wrong or damage or lost
                fault.lost.append(max(0, killed_at - step))
                newest = step
            wrong = self.verdict(run, run.wait()) or wrong
            if kills:
                fault.goodput.append(min(1.0, self.seconds / (time.monotonic() - run.began)))
            elif wrong:
                fault.failures.append(wrong)
            for _ in range(kills):  # a failure counts once
                fault.add(wrong)
                wrong = ""
            shutil.rmtree(run.run_dir, ignore_errors=True)
        return fault

    def _kill_once(self, run: Run, fault: Fault, *, during_save: bool) -> int | None:
        """Kill one rank or both; return the step at that moment, None if the run finished."""
        if not run.wait_until(lambda: len(run.ranks()) == 2):
            return None
        if during_save:
            for _ in range(self.random.randint(1, 3)):
                if not (run.wait_until(lambda: not run.saving()) and run.wait_until(run.saving)):
                    return None
            time.sleep(self.random.uniform(0, 0.6))
        else:
            time.sleep(self.random.uniform(0, self.seconds))
        ranks = run.ranks()
        if len(ranks) != 2 or run.process.poll() is not None:
            return None
        both = during_save and self.random.random() < 1 / 3
        step, now = run.step(), time.monotonic()
        for rank in ranks if both else [self.random.choice(ranks)]:
            send(signal.SIGKILL, rank)
        if not still_alive(ranks, 60):
            fault.noticed.append(time.monotonic() - now)
        return step

    # -- requests to stop, hung processes, a killed launcher; the run is started again by hand --

    def stop(self) -> Fault:
        """Send SIGTERM, SIGINT or SIGUSR1 to the launcher, to one rank, or to all processes."""
        fault = Fault("asked to stop, by TERM, INT or USR1")

        def attempt(number: int, draw: random.Random) -> str:
            start, stopped = ((LAUNCHER, 75), (TORCHRUN, 1))[number % 2]  # torchrun ends with 1
            run = Run(self.folder, f"stop-{number}", start=start)
            self.pause(draw, run)
            request = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            ranks, launcher = run.ranks(), run.process.pid
            receivers = {"launcher": [launcher], "rank": ranks[:1], "all": [launcher, *ranks]}
            receiver = draw.choice(list(receivers))
            step, now = run.step(), time.monotonic()
            for process in receivers[receiver]:
                send(request, process)
            status = run.wait()
            fault.noticed.append(time.monotonic() - now)
            if status not in {0, stopped}:
                return f"{run.name}: {request.name} to {receiver}: exit status {status}"
            return self.resume(fault, run, step)

        return self.in_parallel(fault, attempt)

    def stopped(self) -> Fault:
        """Send SIGSTOP to a rank: the process exists and does not answer."""
        fault = Fault(f"a rank stopped, comm.timeout={TIMEOUT}")

        def attempt(number: int, draw: random.Random) -> str:
            run = Run(self.folder, f"stopped-{number}", f"comm.timeout={TIMEOUT}")
            self.pause(draw, run)
            ranks, step, now = run.ranks(), run.step(), time.monotonic()
            if len(ranks) == 2:
                send(signal.SIGSTOP, draw.choice(ranks))
                status = run.wait()
                fault.noticed.append(time.monotonic() - now)
                left, errors = still_alive(ranks), run.errors()
                if status != 6 or left or len(errors) != 1:
                    return f"{run.name}: exit status {status}, left {left}, printed {errors}"
            return self.resume(fault, run, step)

        return self.in_parallel(fault, attempt)

    def cut(self) -> Fault:
        """Take down the link between two hosts, which are network namespaces (needs root)."""
        fault = Fault(f"the wire cut, comm.timeout={TIMEOUT}")

        def attempt(number: int, draw: random.Random) -> str:
            run = Run(self.folder, f"cut-{number}", f"comm.timeout={TIMEOUT}", start=TWO_HOSTS)
            self.pause(draw, run)
            processes = children(run.process.pid, deep=True)
            step, now = run.step(), time.monotonic()
            link = ["ip", "-n", f"modelpar-{run.process.pid}-0", "link", "set", "wire", "down"]
            if subprocess.run(link, check=False, capture_output=True).returncode:
                return f"{run.name}: did not run: {run.error_log.read_text().splitlines()[-3:]}"
            run.wait()
            if left := still_alive(processes, HUNG_AFTER):
                return f"{run.name}: hung, left {left}"
            fault.noticed.append(time.monotonic() - now)
            return self.resume(fault, run, step)

        return self.in_parallel(fault, attempt) if is_root(fault, "ip") else fault

    def launcher(self) -> Fault:
        """Send SIGKILL to the launcher: its ranks must end too."""
        fault = Fault("the launcher killed")

        def attempt(number: int, draw: random.Random) -> str:
            start = (LAUNCHER, TORCHRUN)[number % 2]
            run = Run(self.folder, f"launcher-{number}", start=start)
            run.wait_until(lambda: len(run.ranks()) == 2)
            time.sleep(draw.uniform(0, self.seconds))
            ranks, step, now = run.ranks(), run.step(), time.monotonic()
            run.process.kill()
            run.process.wait()
            if left := still_alive(ranks, 60):
                return f"{run.name}: ranks {left} outlive their launcher"
            fault.noticed.append(time.monotonic() - now)
            return self.resume(fault, run, step)

        return self.in_parallel(fault, attempt)

    # -- disks, files and settings --

    def disk(self) -> Fault:
        """Fill the disk between saves, or during one (a tmpfs, which needs root)."""
        fault = Fault("the disk full")

        def attempt(number: int, draw: random.Random) -> str:
            disk, copy = self.folder / f"disk-{number}", self.folder / f"copy-{number}"
            disk.mkdir()
            size = draw.randint(200, 560)  # MB; a checkpoint has 162
            fill = (
                f"(until ls {disk}/run/checkpoints/.tmp-* >/dev/null 2>&1; do sleep .02; done; "
                f"sleep {draw.uniform(0, 0.5):.2f}; dd if=/dev/zero of={disk}/fill bs=1M) & "
            )
            script = (
                f"mount -t tmpfs -o size={size}m none {disk}; {fill if number % 2 else ''}"
                f"COMMAND; code=$?; rm -f {disk}/fill; mkdir {copy}; cp -r {disk}/run {copy}/; "
                "exit $code"
            )
            settings = ["checkpoint_every=4", f"monitor.tensorboard={number % 3 == 0}"]
            run = Run(self.folder, f"disk-{number}/run", *settings, script=script)
            status = run.wait()
            if status not in {0, 4} or (status == 4 and len(run.errors()) != 1):
                return f"{run.name}: exit status {status}, printed {run.errors()}"
            if status == 4 and not (copy / "run").is_dir():
                return ""  # refused before anything was written
            _, _, wrong = verify(copy / "run")
            if not wrong:  # continue where there is room
                again = Run(self.folder, f"copy-{number}/run", "checkpoint_every=4")
                wrong = self.verdict(again, again.wait())
            shutil.rmtree(copy)
            return wrong

        return self.in_parallel(fault, attempt) if is_root(fault, "unshare") else fault

    def flip(self) -> Fault:
        """Flip one random bit in each file of a checkpoint, each file at least once."""
        fault = Fault("one bit of a checkpoint's file flipped")
        source = self.folder / "reference"
        newest = max((source / "checkpoints").glob("step-*"))
        names = sorted(path.name for path in newest.iterdir())
        for number in range(max(self.tries, len(names))):
            name, copy = names[number % len(names)], self.folder / "flipped"
            shutil.copytree(source, copy, copy_function=os.link)
            path = copy / "checkpoints" / newest.name / name
            content = bytearray(path.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.unlink()
            path.write_bytes(content)
            run = Run(self.folder, "flipped", f"steps={STEPS + 1}")
            status, text = run.wait(), " ".join(run.errors())
            run.error_log.unlink()
            # The line names the damaged file and the checkpoint from which the run can continue.
            good = status == 4 and name in text and re.search(r"from step-000000\d\d", text)
            fault.add("" if good else f"{name}: exit status {status}, printed {text}")
            shutil.rmtree(copy)
        return fault

    def input(self) -> Fault:
        """Use wrong settings and images: one line at once, and no file is touched."""
        fault = Fault("wrong settings or images")
        rows = [(name, words, None, status, text) for name, words, status, text in SETTINGS]
        newest = f"step-{STEPS:08}"  # of the reference; that of the unit tests ends after 2 steps
        rows += [
            (name, ["run_dir=run"], spoil, 3, text.replace("step-00000002", newest))
            for name, spoil, text in IMAGES
        ]
        self.random.shuffle(rows)
        for name, words, spoil, status, text in rows[: self.tries]:
            place = self.folder / "input"
            shutil.copytree(self.folder / "images", place / "images", copy_function=os.link)
            shutil.copytree(self.folder / "reference", place / "run", copy_function=os.link)
            if spoil:
                spoil(place)
            before, began = contents(place), time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "modelpar.train", *TRAIN, "data.root=images", *words],
                cwd=place,
                env=environment(self.folder),
                capture_output=True,
                check=False,
            )
            fault.noticed.append(time.monotonic() - began)
            if fault.noticed[-1] > SLOW_ERROR:
                print(f"  {name}: {fault.noticed[-1]:.1f} s")
            lines = done.stderr.decode(errors="replace").splitlines()
            good = done.returncode == status and len(lines) == 1 and text in lines[0]
            good = good and contents(place) == before
            fault.add("" if good else f"{name}: exit status {done.returncode}, printed {lines}")
            shutil.rmtree(place)
        return fault


KINDS = ("kill", "save", "stop", "stopped", "cut", "launcher", "disk", "flip", "input")


def inject(tries: int, seed: int, only: list[str]) -> list[Fault]:
    """Make ``tries`` tries of each kind of fault; return their outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        injector = Injector(Path(folder), tries, seed)
        print(f"{STEPS} steps, saved every {EVERY}, take {injector.seconds:.1f} s; seed {seed}")
        faults = []
        for name in only:
            began = time.monotonic()
            faults.append(getattr(injector, name)())
            print(f"{faults[-1].row()} in {time.monotonic() - began:.0f} s", flush=True)
        return faults


def main() -> None:
    """Run from the command line; exit with status 1 unless every try survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    faults = inject(arguments.tries, arguments.seed, arguments.only.split(","))
    table = "\n".join([HEADER, *(fault.row() for fault in faults if fault.tries)])
    print(table)
    if arguments.out:
        arguments.out.write_text(table + "\n")
    sys.exit(any(fault.failures for fault in faults))


if __name__ == "__main__":
    main()
