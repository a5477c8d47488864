"""The commands on one GPU, one after another."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_train_evaluate_figures_and_export_finish(
    gpu_env: dict[str, str], images: Path, tmp_path: Path
) -> None:
    def run(command: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"modelpar.{command}", *words],
            cwd=tmp_path,
            env=gpu_env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    root = f"data.root={images}"
    data = ["data=imagefolder", root, "workers=0", "batch_size=8"]
    small = [*data, "model.image_size=64", "columns=1", "device=cuda", "monitor.progress=false"]
    shown = run("train", *small, "epochs=1", "run_dir=run")
    assert "torch.compile is not used" not in shown
    run(
        "evaluate", "checkpoint=run", f"data.root={images}", "columns=1", "device=cuda", "views=10"
    )
    run("figures", "checkpoint=run", root, "device=cuda", "out=figures")
    assert (tmp_path / "figures" / "figure4.png").exists()
    run("export", "checkpoint=run", "out=net.safetensors")
    assert (tmp_path / "net.safetensors").exists()
