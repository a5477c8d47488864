"""What the GPU tests run in processes that see the GPU: on_gpu.py FUNCTION RESULT_FILE."""

import os
import sys
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from test_exact import BATCH, RECIPES, STEPS, batches, learner, outcome

from modelpar.distributed import Mesh, process_mesh
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.loader import TrainLoader, _Resident
from modelpar.images.order import BatchOrder
from modelpar.images.samples import InMemory, Sample
from modelpar.training.graph import Graphed

IMAGES = 96
SIDE = 80  # of a stored image in pixels
CROP = 64


def to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(part) for key, part in value.items()}
    return value


def trajectories() -> dict[str, Any]:
    """Return what this rank has after some steps in float64, by recipe."""
    with process_mesh(int(os.environ.get("WORLD_SIZE", "1")), "cuda", 60) as mesh:
        return {recipe: to_cpu(outcome(mesh, recipe, STEPS, {})) for recipe in RECIPES[:2]}


def recorded() -> dict[str, Any]:
    """Return what this rank has after steps in float32, of which the last are CUDA graphs."""
    with process_mesh(int(os.environ.get("WORLD_SIZE", "1")), "cuda", 60) as mesh:
        how = {"precision": "float32", "compile": True, "cuda_graph": "on"}
        trained = learner(mesh, "code2012", how)
        losses, sent = [], []
        for step, batch in enumerate(batches(STEPS, BATCH, mesh.device)):
            losses.append(float(trained.step(batch, step, trained.schedule.rates(0))))
            assert trained.finite(torch.tensor(losses[-1]))
            sent.append(0 if trained.link is None else trained.link.bytes_sent)
        assert isinstance(trained.run_batch, Graphed)
        assert isinstance(trained.run_update, Graphed)
        assert trained.run_batch.graph is not None
        assert trained.run_update.graph is not None
        assert sent == [sent[0] * (step + 1) for step in range(STEPS)]
        return {"losses": losses, "weights": to_cpu(trained.optimizer.weights())}


def gradient_errors() -> dict[str, float]:
    """Return the error of each float32 gradient on the GPU, relative to float64 on the CPU."""
    errors: dict[str, float] = {}
    (batch,) = batches(1, BATCH)
    with process_mesh(1, "cuda", 60) as mesh:
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


class FromDisk:
    """Images that the loader does not know to be in memory."""

    def __init__(self, images: InMemory) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index]


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
        device,
        crops="per_image",
        workers=workers or 0,
    )


def loader_errors() -> dict[str, float]:
    """Return how far each batch of the GPU's loader is from the CPU's, in pixel values.

    Many products are queued before each batch, so a copy that is not waited for would be read
    too early.  The loader itself may not wait, which CUDA would report as an error.
    """
    errors: dict[str, float] = {}
    with process_mesh(1, "cuda", 60) as mesh:
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
    for function in (trajectories, recorded, gradient_errors, loader_errors)
}

if __name__ == "__main__":
    torch.save(FUNCTIONS[sys.argv[1]](), Path(sys.argv[2]))
