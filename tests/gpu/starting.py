"""Trainings on one GPU, started as commands.  The tests' own process does not see the GPU."""

import subprocess
import sys
from pathlib import Path

from torch import Tensor

from modelpar.training.checkpoint import newest, read_part

LAUNCHER = ["-m", "modelpar.train"]
STEPS = 20
PATIENCE = 120  # s for a run to start or to finish


class Start:
    """Start trainings in a folder; end what is left of them after the test."""

    def __init__(self, folder: Path, images: Path, env: dict[str, str]) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()
        first = env.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        self.env = {**env, "CUDA_VISIBLE_DEVICES": first}  # with more, the ranks would not share
        self.words = [
            *("data=imagefolder", f"data.root={images}", "model.image_size=64", "workers=0"),
            *("batch_size=8", "precision=float64", "compile=false", "device=cuda"),
            *("monitor.progress=false", "monitor.tensorboard=false"),
        ]

    def __call__(self, name: str, how: list[str], *words: str) -> subprocess.Popen[bytes]:
        """Start a run in the directory ``name``; it prints to ``name``.txt."""
        with (self.folder / f"{name}.txt").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *how, *self.words, f"run_dir={name}", *words],
                cwd=self.folder,
                env=self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def printed(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


def final_weights(run_dir: Path) -> dict[str, Tensor]:
    found = newest(run_dir)
    assert found is not None
    assert found.step == STEPS
    return read_part(found, "weights", None)
