"""The most likely classes of images, for ``modelpar-predict`` and for ``AlexNet.predict``."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from modelpar.analysis.neighbours import (
    distances,
    features,
    most_likely,
    nearest_distinct,
    random_subset,
)
from modelpar.distributed import Mesh
from modelpar.errors import CheckpointError, DataError, SettingsError
from modelpar.images.augment import Augmentation, Statistics
from modelpar.images.folders import find_images, size_of
from modelpar.images.loader import TestLoader
from modelpar.images.samples import ImageSet, Resized
from modelpar.net.weights import check_state
from modelpar.schemas import PredictSettings
from modelpar.training import evaluation
from modelpar.training.engine import Net, log_probabilities
from modelpar.training.trained import TrainedNet, find

BATCH: Final = 128  # images at a time in Python; the default of the command
VIEWS: Final = (1, 9, 10)


@dataclass(frozen=True)
class Prediction:
    """The five most likely classes of an image, or all if there are fewer; most likely first."""

    labels: list[int]
    classes: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Answer:
    """A file, its prediction, and pixels (3, T, T), label and distance of its neighbours."""

    file: str
    prediction: Prediction
    nearest: list[tuple[Tensor, int, float]]


class Pictures(Resized):
    """Files or PIL images as the net's data stores them.

    ``bad``: what one is that cannot be read, the setting of the command, or None.  With ``skip``
    it is grey, and ``skipped`` has the reason, by the number of the picture.
    """

    def __init__(self, pictures: Sequence[Any], side: int, bad: str | None = None) -> None:
        super().__init__(pictures.__getitem__, [0] * len(pictures), side)
        self.bad, self.skipped = bad, dict[int, str]()

    def image(self, index: int) -> Tensor:
        """Return one image as (3, T, T) uint8; raises DataError with its name."""
        picture = self.source(index)
        try:
            if isinstance(picture, (str, os.PathLike)):
                size_of(os.fspath(picture))
            return super().image(index)
        except DataError as error:
            if self.bad != "skip":
                raise DataError(f"{error}, or use bad=skip" if self.bad else error) from None
            self.skipped[index] = str(error)
            return torch.full((3, self.side, self.side), 128, dtype=torch.uint8)


def predictions(
    net: Net,
    batches: Iterable[tuple[Tensor, Tensor]],
    augmentation: Augmentation,
    views: int,
    names: Sequence[str],
) -> Iterator[tuple[Tensor, list[Prediction]]]:
    """Yield each batch of stored images with its predictions.  A collective of the pair."""
    for stored, _ in batches:
        logs = log_probabilities(net, stored, augmentation, views)
        shares = logs.double().exp().cpu()
        if not shares.isfinite().all():
            raise DataError("the net computes values that are not finite; its weights are damaged")
        found = most_likely(shares)
        yield stored, [Prediction(at, [names[one] for one in at], p) for at, p in found]


# -- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What a prediction of files needs before its first batch."""

    trained: TrainedNet
    statistics: Statistics
    files: list[str]
    searched: ImageSet | None  # whose training images may be neighbours


def prepare(settings: PredictSettings, _run_dir: Path | None = None) -> Prepared:
    """Find weights, mean image and files, and the training images if neighbours are wanted.

    Raises CheckpointError, SettingsError, DataError.
    """
    trained = evaluation.find_for(settings, settings.checkpoint)
    if (stats := trained.statistics) is None:
        raise CheckpointError(
            f"checkpoint={settings.checkpoint}: has no mean image; export it again, or convert it "
            "with mean=FILE"
        )
    given = settings.images
    files = find_images(given if isinstance(given, list) else [given])
    searched = None
    if settings.neighbours:
        searched = evaluation.prepare_one(settings, settings.checkpoint, train=True).images
    return Prepared(trained, stats, files, searched)


def predict_files(
    settings: PredictSettings, prepared: Prepared, mesh: Mesh
) -> tuple[list[Answer], list[str]]:
    """Return the answers in the order of the files, and why files were skipped.

    Each replica predicts its share.  A collective of the whole mesh.  Raises DataError.
    """
    trained, stats, searched = prepared.trained, prepared.statistics, prepared.searched
    net = evaluation.loaded(settings, trained, mesh).eval()
    augmentation = Augmentation(stats, trained.plan.image_size, scaled=False, device=mesh.device)
    workers = trained.data.workers if settings.workers is None else settings.workers
    pictures = Pictures(prepared.files, stats.mean.shape[-1], settings.bad)
    loader = TestLoader(pictures, settings.batch_size, mesh, workers=workers)
    found, units = list[Prediction](), list[Tensor]()
    for stored, some in predictions(net, loader, augmentation, settings.views, trained.names):
        found += some
        if searched:
            units.append(features(net, augmentation.center_crop(stored))[1])
    nearest: list[list[tuple[Tensor, int, float]]] = [[] for _ in found]
    if searched and units:
        rows = random_subset(len(searched.train), settings.training_images, trained.seed)
        reading = {"batch_size": settings.batch_size, "workers": workers}
        each = distances(
            net, torch.cat(units), searched.train, augmentation, rows, mesh, **reading
        )
        count = settings.neighbours
        nearest = [nearest_distinct(searched.train, rows, row, count) for row in each]
    files = [prepared.files[row] for row in loader.rows]
    answers = [Answer(*parts) for parts in zip(files, found, nearest, strict=True)]
    own = dict(zip(loader.rows, answers, strict=True)) if mesh.column == 0 else {}
    parts = mesh.gather_objects((own, pictures.skipped))
    bad = {row: why for _, some in parts for row, why in some.items()}
    answered = {row: answer for some, _ in parts for row, answer in some.items() if row not in bad}
    if not answered:
        raise DataError(f"{bad[min(bad)]}; there is no other image")
    return [answered[row] for row in sorted(answered)], [bad[row] for row in sorted(bad)]


# -- Python ---------------------------------------------------------------------------------------


def load(kind: Any, path: str | os.PathLike[str], *link: Any) -> Any:
    """Return the trained net of a run, a step or an exported file, as ``AlexNet.load`` does.

    ``kind`` is AlexNet, or Column with its link.  Raises CheckpointError, SettingsError.
    """
    trained = find(os.fspath(Path(path).expanduser()))
    net = kind(trained.plan, *link, seed=0)
    weights = trained.weights(link[0].column if link else None)
    check_state(net, weights, trained.path)
    net.load_state_dict(weights)
    net.classes, net.statistics = trained.names, trained.statistics
    return net.eval()


def predict(net: Any, images: Any, views: int) -> list[Prediction]:
    """Return the prediction of each image, as ``AlexNet.predict`` does."""
    if net.statistics is None:
        raise SettingsError(
            "predict: this net has no mean image; use AlexNet.load(PATH) with a file that has one"
        )
    if views not in VIEWS:
        raise SettingsError(f"views={views}: use one of {', '.join(map(str, VIEWS))}")
    given = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else [*images]
    pictures = Pictures(given, net.statistics.mean.shape[-1])
    device, training = net.fc8.weight.device, net.training
    augmentation = Augmentation(net.statistics, net.plan.image_size, scaled=False, device=device)
    loader = TestLoader(pictures, BATCH, Mesh(device))
    each = predictions(net, loader, augmentation, views, net.classes)
    try:
        return [prediction for _, some in each for prediction in some]
    finally:
        net.train(training)
