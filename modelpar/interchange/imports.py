"""``modelpar-convert``: weights of another program as a file that every command takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from modelpar import errors
from modelpar.errors import CheckpointError, SettingsError
from modelpar.groups import DataSettings, ModelSettings, RecipeSettings
from modelpar.images.augment import Statistics
from modelpar.interchange import caffe, cuda_convnet
from modelpar.interchange.exports import write
from modelpar.interchange.foreign import Foreign, readable
from modelpar.net import paper
from modelpar.net.four_layer import whole_net
from modelpar.net.plan import Plan, Recipe, plan_for
from modelpar.net.weights import check_state, merge
from modelpar.schemas import ConvertSettings
from modelpar.training.trained import TrainedNet

STATE_DICTS: Final = (".pt", ".pth", ".safetensors")
STORED: Final = 256  # section 2: side of a stored image in pixels, and of Caffe's mean images
TORCHVISION: Final = "classifier.6.bias"  # a tensor of torchvision's AlexNet
TORCHVISION_MEAN: Final = (0.485, 0.456, 0.406)  # torchvision's models: of pixels 0-1, RGB


def convert(settings: ConvertSettings) -> None:
    """Write the weights of ``source`` to ``out``, and print a line that describes the net.

    Raises CheckpointError, SettingsError.
    """
    given, out = settings.source, Path(settings.out)
    paths = [Path(one) for one in (given if isinstance(given, list) else [given])]
    foreign, where = _read(paths), ", ".join(map(str, paths))
    if settings.recipe is not None:
        recipe: RecipeSettings = settings.recipe
    elif foreign.recipe is not None:
        recipe = Recipe.named(foreign.recipe)
    else:
        raise SettingsError(
            f"source={where}: a state dict does not record its recipe; add recipe=NAME"
        )
    plan = _plan(replace(recipe, **foreign.switches), foreign)
    check_state(whole_net(plan, seed=0), foreign.weights, where)
    digests = [f"{path.name} (sha256 {sha256(path.read_bytes()).hexdigest()})" for path in paths]
    trained = TrainedNet(
        str(out),
        out,
        plan,
        data=DataSettings(
            name="imagenet" if plan.num_classes == paper.NUM_CLASSES else "imagefolder",
            image_size=plan.image_size,
            num_classes=plan.num_classes,
        ),
        step=0,
        seed=0,
        images_a_step=0,
        classes=None,
        names=[str(number) for number in range(plan.num_classes)],
        kind="weights",
        statistics=_statistics(settings.mean, foreign),
        record={"made": f"converted from the {foreign.kind} {', '.join(digests)}"},
    )
    write(str(out), trained, foreign.weights)


def _read(paths: Sequence[Path]) -> Foreign:
    """Return what a file holds, or the files of both columns; raises CheckpointError."""
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"source={path}: no such file")
    readers: dict[str, Callable[[Path], Foreign]] = {
        ".caffemodel": caffe.read_caffemodel,
        ".onnx": caffe.read_onnx,
    }
    first, *more = paths
    if first.suffix in STATE_DICTS:
        return _read_states(paths)
    if more:
        raise SettingsError(
            f"source={paths[1]}: a second file; only a state dict may have a file per column"
        )
    return readers.get(first.suffix, cuda_convnet.read_checkpoint)(first)


def _read_states(paths: Sequence[Path]) -> Foreign:
    """Return a state dict of ours or of torchvision, or those of both columns merged."""
    states = [_state(path) for path in paths]
    if len(states) == 1:
        (state,) = states
        if TORCHVISION in state:
            mean = 255 * torch.tensor(TORCHVISION_MEAN)
            return Foreign("state dict of torchvision", state, "paper", mean=mean)
        # The net one_column has the conv1 of a column, and a wider conv5.
        halves = [len(state.get(f"{name}.bias", ())) for name in ("conv1", "conv5")]
        if halves == [paper.LAYERS[name].outputs for name in ("conv1", "conv5")]:
            raise CheckpointError(
                f"source={paths[0]}: holds one column; use source=[FILE,FILE], column 0 first"
            )
        return Foreign("state dict", state)
    what, advice = "are not the two columns of one net", "use source=[FILE,FILE], column 0 first"
    with errors.readable(f"source={paths[0]}, {paths[-1]}: {what}", advice, CheckpointError):
        return Foreign("state dicts", merge(states))


def _state(path: Path) -> dict[str, Tensor]:
    with readable(str(path)):
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
        # DataParallel and DistributedDataParallel put "module." before each name.
        return {key.removeprefix("module."): value.float() for key, value in found.items()}


def _plan(recipe: RecipeSettings, foreign: Foreign) -> Plan:
    """Return the net whose layers have the outputs of the weights; else the paper's."""
    weights = foreign.weights
    last = weights.get(TORCHVISION, weights.get("fc8.bias"))
    classes = paper.NUM_CLASSES if last is None else len(last)
    nets = ["torchvision"] if TORCHVISION in weights else [*paper.NETS]
    outputs = {key.partition(".")[0]: len(value) for key, value in weights.items()}
    plans = [plan_for(recipe, ModelSettings(net=net), classes, foreign.image_size) for net in nets]
    for plan in plans:
        ours = {name: row.outputs * plan.columns for name, row in plan.layers.items()}
        if {**ours, "fc8": classes} == outputs:
            return plan
    return plans[0]


def _statistics(given: str | None, foreign: Foreign) -> Statistics | None:
    """Return the mean image, of the file ``given`` or else of one colour; None: not known."""
    mean = foreign.mean
    if given is not None:
        mean = _read_mean(Path(given), foreign)
    if mean is None:
        return None
    if mean.shape == (3,):
        mean = mean[:, None, None].expand(-1, STORED, STORED)
    shape = tuple(mean.shape)
    if shape != (3, *2 * shape[-1:]) or shape[-1] < foreign.image_size:
        raise CheckpointError(
            f"mean={given}: has shape {shape}; use a mean image (3, T, T) of "
            f"{foreign.image_size} pixels or more, or a mean colour (3,)"
        )
    return Statistics(mean.float().contiguous(), torch.zeros(3), torch.eye(3))  # no colour noise


def _read_mean(path: Path, foreign: Foreign) -> Tensor:
    """Return the mean image or colour of a file, red, green, blue; raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"mean={path}: no such file")
    if path.suffix == ".binaryproto":
        mean = caffe.read_binaryproto(path)
    elif path.suffix == ".npy":
        with readable(str(path)):
            mean = torch.from_numpy(np.load(path, allow_pickle=False))
    else:
        return cuda_convnet.read_mean(path)
    return mean.flip(0) if foreign.bgr and mean.dim() else mean
