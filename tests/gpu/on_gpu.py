"""What the GPU tests run in processes that see the GPU: on_gpu.py RESULT_FILE FUNCTION...

Each function takes the mesh.  In the file is what it returned, or its traceback.
"""

import faulthandler
import os
import sys
import time
import traceback
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch
from test_exact import BATCH, RECIPES, STEPS, batches, learner, outcome

from modelpar import config, shutdown
from modelpar.device import set_up
from modelpar.distributed import Mesh, process_mesh
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.loader import TrainLoader, _Resident
from modelpar.images.order import BatchOrder
from modelpar.images.samples import Images, InMemory
from modelpar.training import prepare, trainer
from modelpar.training.consistency import StepCheck
from modelpar.training.engine import Learner
from modelpar.training.graph import EAGER_CALLS, Graphed

IMAGES = 96
SIDE = 80  # of a stored image in pixels
CROP = 64


def to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(part) for key, part in value.items()}
    return value


def has_graph(trained: Learner) -> bool:
    return isinstance(trained.run, Graphed) and trained.run.graph is not None


def trajectories(mesh: Mesh) -> dict[str, Any]:
    """Return what this rank has after some steps in float64, by recipe."""
    rules = {"label_smoothing": 0.1, "clip": 0.1, "ema": 0.9, "accumulate": 2}
    found = {recipe: to_cpu(outcome(mesh, recipe, STEPS, {})) for recipe in RECIPES[:2]}
    return {**found, "rules": to_cpu(outcome(mesh, "code2012", 3, rules))}


def recorded(mesh: Mesh) -> dict[str, Any]:
    """Return what this rank has after steps in float32, of which the last are CUDA graphs."""
    how = {"precision": "float32", "compile": True, "cuda_graph": "on"}
    trained = learner(mesh, "code2012", how)
    losses, sent = [], []
    for step, batch in enumerate(batches(STEPS, BATCH, mesh.device)):
        losses.append(float(trained.step(batch, step, trained.schedule.rates(0))))
        sent.append(0 if trained.link is None else trained.link.bytes_sent)
    assert has_graph(trained)
    assert trained.good
    assert sent == [sent[0] * (step + 1) for step in range(STEPS)]
    return {"losses": losses, "weights": to_cpu(trained.optimizer.weights())}


def replayed(mesh: Mesh) -> dict[str, Any]:
    """Return losses and states after 50 steps without and with CUDA graphs, in two precisions."""
    found: dict[str, Any] = {}
    set_up("cuda", deterministic=True)  # also for what runs after this
    for precision, graphs in product(("float32", "bfloat16"), ("off", "on")):
        how = {"precision": precision, "compile": True, "cuda_graph": graphs}
        trained = learner(mesh, "code2012", how)
        losses = [
            trained.step(batch, step, trained.schedule.rates(0)).clone()
            for step, batch in enumerate(batches(50, BATCH, mesh.device))
        ]
        assert has_graph(trained) == (graphs == "on")
        state = {"losses": torch.stack(losses), **trained.state()}
        found[f"{precision} {graphs}"] = to_cpu(state)
    return found


def poisoned(mesh: Mesh) -> dict[str, Any]:
    """Return when recorded steps turn bad, and the states before and after.

    The images of the last rank are not finite in step 20.
    """
    how = {"precision": "float32", "compile": True, "cuda_graph": "on"}
    trained, good, states = learner(mesh, "code2012", how), list[bool](), list[Any]()
    for step, batch in enumerate(batches(24, BATCH, mesh.device), 1):
        if step == 20:
            states.append(to_cpu(trained.state()))
            if mesh.rank == mesh.world_size - 1:
                batch.images[0, 0, 0, 0] = torch.nan
        trained.step(batch, step - 1, trained.schedule.rates(0))
        good.append(bool(trained.good))
    assert has_graph(trained)
    return {"good": good, "states": [*states, to_cpu(trained.state())]}


def unwaited(mesh: Mesh) -> dict[str, int]:
    """Train with CUDA's check that the host never waits, and return how many steps were read.

    It covers the loader, the step message, the step and what is logged of it: all of a training
    between two evaluations.
    """
    found: dict[str, int] = {}
    for precision, compiled, graphs in (("bfloat16", True, "on"), ("float64", False, "off")):
        words = [f"columns={mesh.columns}", f"precision={precision}", f"compile={compiled}"]
        words += ["data=synthetic", "model.image_size=64", "batch_size=8", f"cuda_graph={graphs}"]
        settings = config.read("train", words)
        prepared = prepare.prepare(settings)
        check = StepCheck(mesh, shutdown.Request())
        trained = trainer.Trainer(settings, prepared, Path("unused"), check)
        rates, read = trained.learner.schedule.rates(0), list[int]()
        real = trained.readback.take

        def take(in_flight: int = 0, *, real: Any = real, read: list[int] = read) -> Any:
            for launched, values in real(in_flight):
                read.append(launched.number)
                yield launched, values

        trained.readback.take = take  # type: ignore[method-assign]
        for step, batch in enumerate(islice(trained.loader.epoch(0, 0, 0.1), 12)):
            if step == EAGER_CALLS + 2:  # kernels are compiled, and the step is recorded
                torch.cuda.set_sync_debug_mode("error")
            trained._train_step(batch, 0, rates)
        torch.cuda.set_sync_debug_mode("default")
        assert read == list(range(1, 12))  # the last one is in flight
        assert has_graph(trained.learner) == compiled
        found[precision] = len(read)
    return found


def gradient_errors(mesh: Mesh) -> dict[str, float]:
    """Return the error of each float32 gradient on the GPU, relative to float64 on the CPU."""
    errors: dict[str, float] = {}
    (batch,) = batches(1, BATCH)
    for recipe in RECIPES[:2]:
        # Masks would differ: the generators of a CPU and of a GPU draw other numbers.
        exact = learner(Mesh(torch.device("cpu")), recipe, {"dropout": 0.0})
        exact.gradients(batch, 0)
        for compiled in (False, True):
            how = {"dropout": 0.0, "precision": "float32", "compile": compiled}
            trained = learner(mesh, recipe, how)
            assert trained.compiled == compiled
            trained.gradients(batches(1, BATCH, mesh.device)[0], 0)
            for name, weight in exact.net.named_parameters():
                found = trained.net.get_parameter(name).grad
                assert found is not None
                assert weight.grad is not None
                error = (found.cpu().double() - weight.grad).norm() / weight.grad.norm()
                errors[f"{recipe}, compiled={compiled}, {name}"] = float(error)
    return errors


class FromDisk(Images):
    """Images that the loader does not know to be in memory."""

    def __init__(self, images: InMemory) -> None:
        self.images, self.side, self.labels = images, images.side, images.labels

    def image(self, index: int) -> torch.Tensor:
        return self.images.image(index)


def loader(device: torch.device, workers: int | None, *, compiled: bool = False) -> TrainLoader:
    """Return a loader; ``workers`` None: the images are in memory, and stay on a GPU."""
    source = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=source)
    statistics = Statistics(
        torch.rand(3, SIDE, SIDE, generator=source) * 255,
        torch.tensor([60.0, 20.0, 10.0]),
        torch.eye(3),
    )
    images = InMemory(pixels, list(range(IMAGES)), range(IMAGES))
    augmentation = Augmentation(statistics, CROP, scaled=True, device=device)
    if compiled:
        augmentation.compile()
        assert augmentation.fused
    return TrainLoader(
        images if workers is None else FromDisk(images),
        BatchOrder(IMAGES, 8, seed=1),
        augmentation,
        Mesh(device),
        crops="per_image",
        workers=workers or 0,
    )


def loader_errors(mesh: Mesh) -> dict[str, float]:
    """Return how far each batch of the GPU's loader is from the CPU's, in pixel values.

    Many products are queued before each batch, so a copy that is not waited for would be read
    too early.  The loader itself may not wait, which CUDA would report as an error.
    """
    errors: dict[str, float] = {}
    load = torch.randn(4096, 4096, device=mesh.device)
    for workers, compiled in product((0, 1, None), (False, True)):
        expected = loader(torch.device("cpu"), workers)
        found = loader(mesh.device, workers, compiled=compiled)
        assert isinstance(found.source, _Resident) == (workers is None)
        copies = []
        torch.cuda.set_sync_debug_mode("error")
        for epoch in (0, 1):
            for batch in found.epoch(epoch, 0, 0.1):
                for _ in range(20):
                    load = (load @ load).clamp(-1, 1)
                copies.append((batch.images.clone(), batch.labels.clone(), batch.digest))
        torch.cuda.set_sync_debug_mode("default")
        batches = chain(*(expected.epoch(epoch, 0, 0.1) for epoch in (0, 1)))
        for number, (batch, copy) in enumerate(zip(batches, copies, strict=True)):
            assert torch.equal(batch.labels, copy[1].cpu())
            assert batch.digest == copy[2]
            worst = (batch.images - copy[0].cpu()).abs().max()
            errors[f"{workers} workers, compiled={compiled}, batch {number}"] = float(worst)
    return errors


FUNCTIONS = {
    function.__name__: function
    for function in (
        trajectories,
        recorded,
        replayed,
        poisoned,
        unwaited,
        gradient_errors,
        loader_errors,
    )
}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)
    results: dict[str, Any] = {}
    with process_mesh(int(os.environ.get("WORLD_SIZE", "1")), "cuda", 60) as ranks:
        for name in sys.argv[2:]:
            began = time.monotonic()
            try:
                results[name] = FUNCTIONS[name](ranks)
            except Exception:  # noqa: BLE001 - the other functions still run
                results[name] = traceback.format_exc()
            sys.stderr.write(f"{name}: {time.monotonic() - began:.1f} s\n")
    torch.save(results, Path(sys.argv[1]))
