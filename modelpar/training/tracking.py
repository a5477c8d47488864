"""Weights & Biases, which copies what TensorBoard is given."""

from importlib import import_module
from pathlib import Path
from typing import Final
from uuid import uuid4

from omegaconf import OmegaConf

from modelpar.errors import one_line, say
from modelpar.files import atomic_write
from modelpar.training.run_dir import CONFIG

WANDB_ID: Final = "wandb_id"  # in log/, of the run at Weights & Biases


def track(run_dir: Path) -> None:
    """Start or continue the run of Weights & Biases that copies TensorBoard's events.

    If that fails, a line says why.  It must start before TensorBoard.
    """
    log = run_dir / "log"
    try:
        if not (log / WANDB_ID).is_file():
            log.mkdir(exist_ok=True)
            atomic_write(log / WANDB_ID, uuid4().hex)
        import_module("wandb").init(
            id=(log / WANDB_ID).read_text("utf-8"),
            name=run_dir.name,
            dir=str(log),
            resume="allow",
            config=OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG)),
            sync_tensorboard=True,
            settings={"console": "off"},
        )
    except Exception as error:  # noqa: BLE001 - of a library and of its server
        say(f"{run_dir}: not sent to Weights & Biases ({one_line(error)})")
