"""Triton kernels, each with a reference implementation in torch."""

import os
from importlib.util import find_spec
from typing import Final

import torch

DTYPES: Final = (torch.float32, torch.bfloat16)  # of what the kernels take


def available(device: torch.device) -> bool:
    """Return whether the kernels run on ``device``: a GPU with Triton, or its interpreter.

    The interpreter, for tests, needs ``TRITON_INTERPRET=1`` before Triton is first imported.
    """
    if find_spec("triton") is None:
        return False
    return device.type == "cuda" or (
        device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    )
