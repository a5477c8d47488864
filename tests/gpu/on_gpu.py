"""What the GPU tests run in processes that see the GPU: on_gpu.py FUNCTION RESULT_FILE."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from test_exact import BATCH, RECIPES, STEPS, batches, learner, outcome

from modelpar.distributed import Mesh, process_mesh
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.loader import TrainLoader
from modelpar.images.order import BatchOrder
from modelpar.images.samples import InMemory

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


def loader(device: torch.device, workers: int) -> TrainLoader:
    source = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=source)
    statistics = Statistics(
        torch.rand(3, SIDE, SIDE, generator=source) * 255,
        torch.tensor([60.0, 20.0, 10.0]),
        torch.eye(3),
    )
    return TrainLoader(
        InMemory(pixels, list(range(IMAGES)), range(IMAGES)),
        BatchOrder(IMAGES, 8, seed=1),
        Augmentation(statistics, CROP, scaled=True, device=device),
        device,
        crops="per_image",
        workers=workers,
    )


def loader_errors() -> dict[str, float]:
    """Return how far each batch of the GPU's loader is from the CPU's, in pixel values.

    Many products are queued before each batch, so a copy that is not waited for would be read
    too early.
    """
    errors: dict[str, float] = {}
    for workers in (0, 1):
        with process_mesh(1, "cuda", 60) as mesh:
            expected = loader(torch.device("cpu"), workers).epoch(0, 0, 0.1)
            found = loader(mesh.device, workers).epoch(0, 0, 0.1)
            load = torch.randn(4096, 4096, device=mesh.device)
            copies = []
            for batch in found:
                for _ in range(20):
                    load = (load @ load).clamp(-1, 1)
                copies.append((batch.images.clone(), batch.labels.clone()))
            for number, (batch, copy) in enumerate(zip(expected, copies, strict=True)):
                assert torch.equal(batch.labels, copy[1].cpu())
                worst = (batch.images - copy[0].cpu()).abs().max()
                errors[f"{workers} workers, batch {number}"] = float(worst)
    return errors


FUNCTIONS = {
    function.__name__: function for function in (trajectories, gradient_errors, loader_errors)
}

if __name__ == "__main__":
    torch.save(FUNCTIONS[sys.argv[1]](), Path(sys.argv[2]))
