"""Initial weights, and how the whole net's state dict is split over two columns and merged."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from modelpar.errors import CheckpointError
from modelpar.net.paper import COLUMNS
from modelpar.net.plan import Plan
from modelpar.seeding import generator


def initial_weights(
    plan: Plan, seed: int | None, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Draw the whole net's initial weights, float32: normal, biases constant (section 5).

    A function of seed and layer alone, which ``split`` slices: so one process and two start
    equal.  Without a seed torch's global generator is used.
    """
    state: dict[str, Tensor] = {}
    for name in plan.layers if names is None else names:
        row = plan.layers[name]
        inputs = plan.inputs(name)
        if name == "fc8" or name in plan.crossing_at:
            inputs *= plan.columns
        outputs = plan.outputs(name) * (1 if name == "fc8" else plan.columns)
        shape = (outputs, inputs) + (row.kernel, row.kernel) * (row.kernel > 0)
        source = None if seed is None else generator(seed, "init", name)
        weight = torch.empty(shape, dtype=torch.float32, device="cpu")
        state[f"{name}.weight"] = weight.normal_(0, plan.std(name), generator=source)
        state[f"{name}.bias"] = torch.full((outputs,), row.bias, device="cpu")
    return state


def column_slice(key: str, value: Tensor, column: int) -> Tensor | None:
    """Return the part of the whole net's ``value`` that ``column`` owns; None: it owns none.

    Outputs are halved, but fc8's inputs; its bias is column 0's.
    """
    if key == "fc8.bias":
        return value if column == 0 else None
    return value.chunk(COLUMNS, dim=1 if key == "fc8.weight" else 0)[column]


def location(key: str, shape: Sequence[int], columns: int, column: int) -> dict[str, list[int]]:
    """Say where a part of ``shape`` lies in the whole net's tensor: its shape, the first index."""
    whole, first = list(shape), [0] * len(shape)
    if columns > 1 and key != "fc8.bias":
        axis = 1 if key == "fc8.weight" else 0
        whole[axis] *= columns
        first[axis] = column * shape[axis]
    return {"whole": whole, "first": first}


def column_state(state: Mapping[str, Tensor], column: int) -> dict[str, Tensor]:
    """Return one column's state dict, views of the whole net's ``state``."""
    parts = {key: column_slice(key, value, column) for key, value in state.items()}
    return {key: part for key, part in parts.items() if part is not None}


def split(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return both columns' state dicts, views of the whole net's ``state``."""
    return [column_state(state, column) for column in range(COLUMNS)]


def merge(columns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the whole net's state dict from both columns'; the inverse of ``split``."""
    return {
        key: value
        if key == "fc8.bias"
        else torch.cat([column[key] for column in columns], dim=1 if key == "fc8.weight" else 0)
        for key, value in columns[0].items()
    }


def load_initial(net: nn.Module, plan: Plan, seed: int | None, column: int | None) -> None:
    """Give ``net`` its share of the initial weights, on torch's default device."""
    device = torch.get_default_device()
    for name in plan.layers:  # one whole layer in memory at a time
        for key, value in initial_weights(plan, seed, [name]).items():
            part = value if column is None else column_slice(key, value, column)
            if part is not None:
                own = part.to(device).clone(memory_format=torch.contiguous_format)
                setattr(net.get_submodule(name), key.partition(".")[2], nn.Parameter(own))


def check_state(
    net: nn.Module, state: Mapping[str, Tensor], source: str, *, learnt: bool = False
) -> None:
    """Raise CheckpointError that names the first tensor of ``state`` that does not fit ``net``.

    ``learnt``: ``state`` has a tensor for each parameter, and nothing else.
    """
    own = dict(net.named_parameters()) if learnt else net.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in state:
            raise CheckpointError(f"{source}: {key} is missing")
        if key not in own:
            raise CheckpointError(f"{source}: {key} is none of this net's tensors")
        if own[key].shape != state[key].shape:
            raise CheckpointError(
                f"{source}: {key} is {tuple(state[key].shape)}, this net's is "
                f"{tuple(own[key].shape)}; give the classes and image size it was trained with"
            )
