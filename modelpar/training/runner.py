"""One run from its start to its end: what it resumes, prints, records and leaves behind."""

from pathlib import Path
from typing import Final

from modelpar import shutdown
from modelpar.command import Output
from modelpar.distributed import Mesh
from modelpar.errors import say
from modelpar.images.sets import IN_FOLDERS
from modelpar.progress import show
from modelpar.settings import TrainSettings
from modelpar.training import report
from modelpar.training.consistency import StepCheck
from modelpar.training.prepare import Prepared, agreed_start
from modelpar.training.run_dir import locked, trajectory_changes, write_config
from modelpar.training.trainer import Trainer

# The ratios are those of docs/benchmarks.md, on two cores.
UNPREPARED: Final = (
    "each epoch decodes and scales the images again; after modelpar-prepare, JPEG files were read "
    "2.5 and pixels 24 times as fast"
)


def train(settings: TrainSettings, prepared: Prepared, mesh: Mesh, run_dir: Path) -> None:
    """Train in ``run_dir`` until epochs or steps are over, from its newest checkpoint if any.

    A finished run is left as it is.  A collective of the whole mesh.
    """
    Output.waits = False
    with shutdown.signals_noted() as request, locked(run_dir, mesh):
        prepared = agreed_start(settings, prepared, run_dir, mesh)
        start = prepared.start
        if start is not None and prepared.finished:
            if mesh.rank == 0:
                report.ended(settings, prepared, run_dir)
            return
        trainer = Trainer(settings, prepared, run_dir, StepCheck(mesh, request))
        if start is not None:
            trainer.resume(start)
        elif settings.init.checkpoint is not None:
            trainer.load_layers(settings.init.checkpoint, settings.init.layers)
        if mesh.rank == 0:
            own = sum(weight.numel() for weight in trainer.learner.net.parameters())
            report.started(settings, prepared, mesh, run_dir, own)
            if prepared.images.skipped:
                say(prepared.images.skipped)
            if prepared.data.name in IN_FOLDERS:
                show(f"modelpar: {UNPREPARED}")
            for change in trajectory_changes(run_dir, settings):
                show(f"modelpar: {run_dir} continues with {change}, which alters its trajectory")
        write_config(run_dir, settings, mesh)
        try:
            trainer.open_monitor()
            trainer.run()
        finally:
            if trainer.monitor:
                trainer.monitor.close()
            trainer.checkpointer.join()
