"""Initial weights, and how the whole net's state dict is split over two columns and merged."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modelpar.errors import CheckpointError, refuse_choice
from modelpar.net.paper import COLUMNS
from modelpar.net.plan import Plan
from modelpar.seeding import generator


def split_dim(key: str) -> int | None:
    """Return the dimension along which the columns share a tensor; None: column 0 has it whole.

    That is the outputs, except for fc8: it is split by its inputs, and its bias is column 0's.
    """
    return {"fc8.weight": 1, "fc8.bias": None}.get(key, 0)


def location(key: str, shape: Sequence[int], columns: int, column: int) -> dict[str, list[int]]:
    """Return the shape of the whole net's tensor, and the first index of a part of ``shape``."""
    whole, first = list(shape), [0] * len(shape)
    dim = split_dim(key)
    if columns > 1 and dim is not None:
        whole[dim] *= columns
        first[dim] = column * shape[dim]
    return {"whole": whole, "first": first}


def column_state(state: Mapping[str, Tensor], column: int) -> dict[str, Tensor]:
    """Return one column's state dict, views of the whole net's ``state``."""
    part: dict[str, Tensor] = {}
    for key, value in state.items():
        dim = split_dim(key)
        if dim is not None:
            part[key] = value.chunk(COLUMNS, dim)[column]
        elif column == 0:
            part[key] = value
    return part


def split(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return both columns' state dicts, views of the whole net's ``state``."""
    return [column_state(state, column) for column in range(COLUMNS)]


def merge(columns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the whole net's state dict from both columns'; the inverse of ``split``."""
    whole: dict[str, Tensor] = {}
    for key, value in columns[0].items():
        dim = split_dim(key)
        whole[key] = value if dim is None else torch.cat([part[key] for part in columns], dim)
    return whole


def load_initial(net: nn.Module, plan: Plan, seed: int | None, column: int | None = None) -> None:
    """Set the initial weights of ``net``, or of its ``column``, on torch's default device.

    Weights are normal, biases constant, all in float32 (section 5).  They depend only on seed and
    layer: each tensor is drawn for the whole net and sliced, so one process and two start with
    the same net.  Without a seed torch's global generator is used.
    """
    device = torch.get_default_device()
    columns = 1 if column is None else COLUMNS
    for key, parameter in list(net.named_parameters()):  # one whole tensor in memory at a time
        layer, _, kind = key.partition(".")
        shape = location(key, parameter.shape, columns, column or 0)["whole"]
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        if kind == "bias":
            value.fill_(plan.layers[layer].bias)
        else:
            source = None if seed is None else generator(seed, "init", layer)
            value.normal_(0, plan.std(layer), generator=source)
        part = value if column is None else column_state({key: value}, column)[key]
        fresh = part.to(device).clone(memory_format=torch.contiguous_format)
        setattr(net.get_submodule(layer), kind, nn.Parameter(fresh))


def check_state(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError, with the first tensor of ``state`` that does not fit ``net``."""
    _check_tensors(
        net.state_dict(), state, source, "use the classes and image size of its training"
    )


def of_layers(
    net: nn.Module, state: Mapping[str, Tensor], layers: Sequence[str], source: str
) -> dict[str, Tensor]:
    """Return the weights and biases of ``layers`` in ``state``, which fit those of ``net``.

    Raises SettingsError for a layer that ``net`` does not have, and CheckpointError.
    """
    keys = {name: name.rpartition(".")[0] for name, _ in net.named_parameters()}
    own = list(dict.fromkeys(keys.values()))
    chosen: dict[str, Tensor] = {}
    for layer in layers:
        if layer not in own:
            refuse_choice("init.layers", layer, own)
        names = [name for name, its in keys.items() if its == layer]
        found = {name: value for name, value in state.items() if name.startswith(f"{layer}.")}
        expected = {name: net.get_parameter(name) for name in names}
        _check_tensors(expected, found, source, f"leave {layer} out of init.layers")
        chosen |= found
    return chosen


def _check_tensors(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, fix: str
) -> None:
    for key in sorted(expected.keys() | state.keys()):
        if key not in state:
            raise CheckpointError(f"{source}: {key} is missing")
        if key not in expected:
            raise CheckpointError(f"{source}: {key} is not a tensor of this net")
        if expected[key].shape != state[key].shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tuple(state[key].shape)}, this net's has "
                f"{tuple(expected[key].shape)}; {fix}"
            )
