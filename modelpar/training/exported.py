"""The file that ``modelpar-export`` writes: weights, and a record of the net in its metadata."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
from torch import Tensor

from modelpar.images.augment import Statistics
from modelpar.training.checkpoint import HASH, hashes

METADATA: Final = "modelpar"  # plan, data, numbers of the run and how it was made, as JSON
STATISTICS: Final = "statistics"  # mean image and colours, a safetensors file in base64


def content_of(
    weights: Mapping[str, Tensor], record: Mapping[str, Any], statistics: Statistics | None
) -> bytes:
    """Return the content of the file; its tensors are the weights only.

    A hash of everything else is in its metadata.
    """
    metadata = {METADATA: json.dumps(record)}
    if statistics is not None:
        saved = safetensors.torch.save(vars(statistics))
        metadata[STATISTICS] = base64.b64encode(saved).decode()
    _, found = hashes(safetensors.torch.save(dict(weights), metadata))
    return safetensors.torch.save(dict(weights), {**metadata, HASH: found})


def read(path: Path) -> tuple[dict[str, Any], Statistics | None]:
    """Return the record, and the statistics unless the file has none.

    Raises KeyError, ValueError, TypeError or SafetensorError if the file is another one, OSError
    if it cannot be read.
    """
    path.open("rb").close()  # safetensors has another error for a file that may not be read
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    record, saved = json.loads(metadata[METADATA]), metadata.get(STATISTICS)
    if saved is None:
        return record, None
    return record, Statistics(**safetensors.torch.load(base64.b64decode(saved)))
