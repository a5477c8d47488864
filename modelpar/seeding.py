"""Random generators that depend only on a seed and on what is drawn, and hashes of tensors."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def generator(seed: int, *keys: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device`` whose state is a pure function of ``seed`` and ``keys``.

    The keys name what is drawn (a layer, an epoch, a step), never the rank that draws it.  That
    is why one process and two follow the same trajectory.
    """
    state = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(state, "little") >> 1)


def digest(tensors: Iterable[Tensor]) -> int:
    """Return a 63-bit hash of the bytes of all ``tensors``, in their order."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(content.numpy().data)
    return int.from_bytes(total.digest(), "little") >> 1
