"""The real commands, started by the launcher and by torchrun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import QUICK, SMALL, TIMEOUT, TINY, fine, ours, rows, run, started
from processes import children
from safetensors.torch import load_file

from modelpar import AlexNet, merge
from modelpar.images.augment import Augmentation, Statistics
from modelpar.shutdown import DEBOUNCE_SECONDS
from modelpar.training.checkpoint import find, newest, read_part, read_statistics

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
COMPILED = [*SMALL, "compile=true"]
# A test of 16 images.  That of photos has 1,008, which takes minutes in float64.
SYNTHETIC = ["data=synthetic", "model.image_size=64", "model.num_classes=10"]
HOW = "1 thread each"


def torchrun(
    cwd: Path, *words: str, ranks: int = 2, main: str = "train"
) -> subprocess.CompletedProcess[str]:
    return run([*TORCHRUN, str(ranks), "-m", f"modelpar.{main}", *words], cwd)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = newest(run_dir)
    assert found is not None
    return read_part(found, "weights", None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, started by the launcher."""
    folder = tmp_path_factory.mktemp("trained")
    out = fine(ours(folder, *COMPILED, "steps=6", "run_dir=run", "checkpoint_every=2"))
    assert out.startswith(f"modelpar: two columns on 2 CPU processes (gloo), {HOW}, float32\n")
    assert "modelpar: compiling; " in out
    assert "\nnet       two_columns, recipe code2012, 20,225,422 parameters\n" in out
    assert "\nlength    6 steps of 16 images, " in out
    assert "\nstart     new run\n" in out
    assert f"\nstep 6  epoch   0  error {rows(folder / 'run', 'test')[0]['top1']:5.2f} +- " in out
    assert "\nfinished  step 6 of 6; 6 steps in 0:0" in out
    assert f"  modelpar-evaluate checkpoint={folder}/run views=10\n" in out
    return folder / "run"


def test_run_directory_has_the_documented_contents(trained: Path) -> None:
    names = {path.name.partition(".")[0] for path in trained.iterdir()}
    projector = {"projector_config", "00006"}
    assert names == {"config", "metrics", "events", "checkpoints", "log", "conv1", *projector}
    steps = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000006"]  # the last two
    train, test = rows(trained), rows(trained, "test")
    assert [row["step"] for row in train] == list(range(1, 7))
    assert set(train[0]) == {
        "kind",
        "step",
        "epoch",
        "loss",
        "top1",
        "lr",
        "images_per_s",
        "data_wait_s",
        "crossing_s",
        "exchange_bytes_per_image",
    }
    # 64 pixels: conv3 128 x 3 x 3, fc6 128, fc7 2048, both ways; 14 logits one way
    expected = 4 * (2 * (128 * 9 + 128 + 2048) + 14)
    assert [row["exchange_bytes_per_image"] for row in train] == [expected] * 6
    assert all(0 <= row["top1"] <= 100 and (row["top1"] * 0.16).is_integer() for row in train)
    (last,) = test
    assert set(last) == {"kind", "step", "loss", "top1", "top5", "standard_error", "views"}
    assert last["step"] == 6
    config = (trained / "config.yaml").read_text()
    assert "name: code2012" in config
    assert "${" not in config  # resolved


@pytest.mark.slow
def test_launcher_torchrun_and_one_process_give_the_same_result(tmp_path: Path) -> None:
    how = [*SMALL, *SYNTHETIC, "steps=4", "precision=float64", "monitor.tensorboard=false"]
    fine(ours(tmp_path, *how, "run_dir=two"))
    fine(torchrun(tmp_path, *how, "run_dir=torchrun"))
    out = fine(ours(tmp_path, *how, "run_dir=one", "columns=1"))
    assert out.startswith("modelpar: the whole net on one CPU process, ")
    losses = {
        name: [row["loss"] for row in rows(tmp_path / name)] for name in ("two", "torchrun", "one")
    }
    assert losses["two"] == losses["torchrun"]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-12)
    pair, again, whole = (weights(tmp_path / name) for name in ("two", "torchrun", "one"))
    assert whole.keys() == pair.keys()
    for key in whole:
        assert torch.equal(pair[key], again[key])
        assert float((pair[key] - whole[key]).norm() / whole[key].norm()) < 1e-12, key
    errors = [rows(tmp_path / name, "test")[0]["top1"] for name in ("two", "torchrun", "one")]
    assert errors[0] == errors[1] == errors[2]


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, trained: Path) -> None:
    how = [*COMPILED, "run_dir=run", "monitor.tensorboard=false"]
    fine(ours(tmp_path, *how, "steps=2"))
    fine(torchrun(tmp_path, *how, "steps=5"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:  # left by a process that was killed after its checkpoint
        file.write('{"kind": "train", "step": 6, "loss": 9.9}\n{"kind": "tra')
    fine(ours(tmp_path, *how, "steps=6"))
    once, again = weights(trained), weights(tmp_path / "run")
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 7))
    assert [row["loss"] for row in rows(tmp_path / "run")] == [
        row["loss"] for row in rows(trained)
    ]


@pytest.mark.slow
def test_finished_run_exits_0_and_changes_nothing(trained: Path) -> None:
    def contents() -> dict[str, bytes]:
        kept = [
            path for path in trained.rglob("*") if path.is_file() and "hydra" not in path.parts
        ]
        return {str(path): path.read_bytes() for path in kept}

    before = contents()
    out = fine(ours(trained.parent, *SMALL, "steps=4", "run_dir=run", "checkpoint_every=2"))
    assert "finished  step 6 of 4\n" in out
    assert contents() == before


@pytest.mark.slow
def test_resume_from_a_path_starts_a_new_run(tmp_path: Path, trained: Path) -> None:
    step = trained / "checkpoints" / "step-00000004"
    fine(ours(tmp_path, *COMPILED, "steps=6", "run_dir=new", f"resume={step}"))
    once, again = weights(trained), weights(tmp_path / "new")
    assert all(torch.equal(once[key], again[key]) for key in once)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run of two steps that has ten test images."""
    folder = tmp_path_factory.mktemp("small")
    fine(ours(folder, *SMALL, *TINY, f"data.root={images}", "steps=2", "run_dir=run"))
    return folder / "run"


@pytest.mark.slow
def test_evaluate_on_two_processes_equals_on_one(tmp_path: Path, small: Path) -> None:
    how = [f"checkpoint={small}", "views=10", "precision=float64"]
    outputs = [
        fine(ours(tmp_path, *how, main="evaluate")),
        fine(ours(tmp_path, *how, "columns=1", main="evaluate")),
        fine(torchrun(tmp_path, *how, main="evaluate")),
    ]
    lines = [out.splitlines()[-1] for out in outputs]
    assert lines[0] == lines[1] == lines[2]
    assert "10 images" in lines[0]
    assert not list(tmp_path.iterdir())  # an evaluation writes nothing
    single = fine(ours(tmp_path, f"checkpoint={small}", main="evaluate")).splitlines()[-1]
    assert f"top-1 error {rows(small, 'test')[0]['top1']:.4f} %" in single


@pytest.mark.slow
def test_exported_file_loads_into_the_whole_net(tmp_path: Path, trained: Path) -> None:
    out = tmp_path / "sub" / "net.safetensors"
    said = fine(ours(tmp_path, f"checkpoint={trained}", f"out={out}", main="export"))
    assert "16 tensors" in said
    state = load_file(out)
    net = AlexNet.from_recipe("code2012", 14, 64)
    net.load_state_dict(state)
    found = find(str(trained))
    columns = [read_part(found, "weights", column) for column in (0, 1)]  # type: ignore[arg-type]
    assert all(torch.equal(value, state[key]) for key, value in merge(columns).items())
    statistics = Statistics(**read_statistics(found))  # type: ignore[arg-type]
    augmentation = Augmentation(statistics, 64, scaled=False, device="cpu")
    assert net.eval()(
        augmentation.center_crop(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
    ).shape == (
        1,
        14,
    )
    done = ours(tmp_path, f"checkpoint={out}", "columns=1", main="evaluate")
    line = fine(done).splitlines()[-1]
    assert f"top-1 error {rows(trained, 'test')[0]['top1']:.4f} %" in line


@pytest.mark.slow
def test_two_replicas_train(tmp_path: Path) -> None:
    how = [*SYNTHETIC, "monitor.progress=false", "steps=3", "precision=float64"]
    how += ["monitor.tensorboard=false"]
    fine(ours(tmp_path, *how, "run_dir=four", "replicas=2", "batch_size=8"))
    fine(ours(tmp_path, *how, "run_dir=one", "columns=1", "batch_size=16"))
    four, one = (rows(tmp_path / name) for name in ("four", "one"))
    assert [row["loss"] for row in four] == pytest.approx([row["loss"] for row in one], rel=1e-12)
    pairs, whole = weights(tmp_path / "four"), weights(tmp_path / "one")
    for key in whole:
        assert float((pairs[key] - whole[key]).norm() / whole[key].norm()) < 1e-12, key


# -- what is refused ------------------------------------------------------------------------------

BAD = [  # as real commands; the others are in tests/unit/test_bad_input.py
    (["batchsize=4"], 2, "did you mean batch_size?"),
    (["data=imagefolder", "data.root=nowhere"], 3, "nowhere: no such folder"),
]


@pytest.mark.parametrize(("words", "status", "said"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_print_one_line_and_create_nothing(
    tmp_path: Path, words: list[str], status: int, said: str
) -> None:
    done = ours(tmp_path, *words, "run_dir=run")
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("modelpar: ")
    assert said in line
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_under_torchrun_one_rank_reports(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "batchsize=4")
    assert done.returncode == 1  # torchrun's own
    said = [line for line in done.stderr.splitlines() if line.startswith("modelpar: ")]
    assert said == ["modelpar: batchsize: no such setting; did you mean batch_size?"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_world_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "run_dir=run", ranks=3)
    assert "columns=2 replicas=1: a world of 3 does not fit" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_checkpoint_of_another_training_is_refused(tmp_path: Path, trained: Path) -> None:
    done = ours(tmp_path, *SMALL, "seed=7", "run_dir=new", f"resume={trained}")
    assert done.returncode == 4
    assert "made with another seed" in done.stderr
    assert not list(tmp_path.iterdir())


def test_run_dir_of_another_run_is_refused_and_unchanged(trained: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in trained.rglob("*"))
    done = ours(trained.parent, *SMALL, "steps=6", "run_dir=run", "seed=5")
    assert done.returncode == 2
    assert "seed=0, not 5" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.stat().st_mtime_ns for path in trained.rglob("*")) == before


@pytest.mark.slow
def test_sweep_under_torchrun_is_refused_with_the_right_command(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "-m", "seed=0,1")
    assert "python -m modelpar.train -m seed=0,1" in done.stderr


@pytest.mark.slow
def test_settings_and_help_are_shown(tmp_path: Path) -> None:
    assert "name: code2012" in fine(ours(tmp_path, "--cfg", "job"))
    assert "recipe" in fine(ours(tmp_path, "--help"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_each_start_without_run_dir_is_a_new_run(tmp_path: Path) -> None:
    for _ in range(2):
        fine(ours(tmp_path, *SMALL, *QUICK, "steps=1", "columns=1"))
    assert len(list((tmp_path / "outputs").glob("*/*/metrics.jsonl"))) == 2


@pytest.mark.slow
def test_run_without_a_compiler_trains_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    done = torchrun(tmp_path, *COMPILED, "steps=1", "run_dir=run")
    assert "modelpar: torch.compile is not used and steps are slower (" in fine(done) + done.stderr
    assert len(rows(tmp_path / "run")) == 1


NOHUP = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="the tests run under nohup"
)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=[pytest.mark.slow, NOHUP]),
    ],
)
def test_signal_saves_and_the_run_resumes(tmp_path: Path, number: signal.Signals) -> None:
    group = number != signal.SIGUSR1  # a terminal or a scheduler signals the whole group
    process = started(tmp_path, "steps=500", *QUICK)
    (os.killpg if group else os.kill)(process.pid, number)
    assert_saved_and_resumes(tmp_path, process, number)


# Starts two tasks, as Slurm's does on one node, and ends with the status of the first.
SRUN = """#!/usr/bin/env bash
trap : USR1
shift  # --cpu-bind
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id "$@" & tasks+=($!); done
for _ in warning end; do wait "${tasks[0]}"; done
"""


@pytest.mark.slow
def test_job_on_slurm_saves_after_its_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    slurm = {"CPUS_PER_TASK": 1, "JOB_ID": os.getpid(), "NTASKS": 2, "NTASKS_PER_NODE": 2}
    for name, value in {**slurm, "LAUNCH_NODE_IPADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    script = ("bash", str(Path(__file__).parents[2] / "launch" / "slurm_pair.sbatch"))
    process = started(tmp_path, "steps=500", *QUICK, command=script)
    os.killpg(process.pid, signal.SIGUSR1)
    assert_saved_and_resumes(tmp_path, process, signal.SIGUSR1)


def assert_saved_and_resumes(
    tmp_path: Path, process: subprocess.Popen[str], number: signal.Signals
) -> None:
    _, text = process.communicate(timeout=60)
    assert process.returncode == 75
    saved = newest(tmp_path / "run")
    assert saved is not None
    (line,) = text.splitlines()
    assert f"({number.name}), saved at step {saved.step} of 500; the same command" in line
    assert json.loads((tmp_path / "run" / "log" / "exit.json").read_text())["status"] == 75
    steps = saved.step + 1
    fine(ours(tmp_path, *SMALL, "run_dir=run", f"steps={steps}", *QUICK))
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, steps + 1))
    assert not (tmp_path / "run" / "log" / "exit.json").exists()  # it was of an earlier end


@pytest.mark.slow
def test_ranks_save_and_exit_when_the_launcher_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path, "steps=500", *QUICK)
    ranks = children(process.pid, deep=True)
    assert len(ranks) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert newest(tmp_path / "run") is not None  # they saved first


@pytest.mark.slow
def test_second_start_of_an_active_run_is_refused(tmp_path: Path) -> None:
    how = [*QUICK, "steps=5000"]
    process = started(tmp_path, *how)
    again = ours(tmp_path, *SMALL, "run_dir=run", *how)
    assert again.returncode == 4
    assert "in use by another run" in again.stderr
    assert not (tmp_path / "run" / "log" / "exit.json").exists()
    process.terminate()
    _, text = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75
    assert "(SIGTERM), saved at step " in text


@pytest.mark.slow
def test_second_signal_kills_blocked_ranks(tmp_path: Path) -> None:
    process = started(tmp_path, "steps=500", *QUICK)
    hung = max(child for child in children(process.pid, deep=True) if is_rank(child))
    os.kill(hung, signal.SIGSTOP)  # the other rank blocks and runs no signal handler
    process.terminate()
    time.sleep(DEBOUNCE_SECONDS + 1)
    began = time.monotonic()
    process.terminate()
    process.wait(30)
    assert time.monotonic() - began < 15
    assert not Path(f"/proc/{hung}").exists()


def is_rank(number: int) -> bool:
    """Whether the process is a rank."""
    return "run_dir=" in Path(f"/proc/{number}/cmdline").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("closed", [False, True])
def test_run_succeeds_without_a_reader_or_without_streams(
    tmp_path: Path, images: Path, *, closed: bool
) -> None:
    words = [*SMALL, *TINY, f"data.root={images}"]
    readable, writable = os.pipe()
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-m", "modelpar.train", *words, "run_dir=run", "steps=2", "columns=1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        stdout=writable,
        stderr=writable,
        preexec_fn=(lambda: os.closerange(0, 3)) if closed else None,  # noqa: PLW1509
    )
    for end in (readable, writable):
        os.close(end)
    assert process.wait(TIMEOUT) == 0
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 2])
def test_a_damaged_test_image_is_one_line_and_the_trained_step_is_saved(
    tmp_path: Path, images: Path, columns: int
) -> None:
    root = shutil.copytree(images, tmp_path / "images")
    damaged = next((root / "val").iterdir()) / "damaged.png"
    damaged.write_text("<html>")
    words = [*SMALL, *TINY, "data.root=images", "run_dir=run", "steps=2", f"columns={columns}"]
    done = ours(tmp_path, *words)
    assert done.returncode == 3, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"modelpar: {damaged}: cannot read image ")
    assert "SIGABRT" not in done.stderr
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()


@pytest.mark.slow
def test_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root, to make a small disk")
    words = " ".join([*SMALL, "run_dir=disk/run", "steps=2"])
    script = (
        "mkdir disk && mount -t tmpfs -o size=1m none disk && "
        f"head -c 900000 /dev/zero > disk/fill; {sys.executable} -m modelpar.train {words}"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"modelpar: {tmp_path}/disk/run: what a run writes down needs 1 MB, 0 MB are free"
    )
