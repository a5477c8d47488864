"""Random generators that are functions of a seed and of what is drawn, and digests of tensors."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def generator(seed: int, *keys: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that is a pure function of ``seed`` and ``keys``, on ``device``.

    The keys say what is drawn (a layer, an epoch, a step), never which rank draws it: that is
    what makes one process and two follow the same trajectory.
    """
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def digest(tensors: Iterable[Tensor]) -> int:
    """Return 63 bits of a hash of the tensors' bytes."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(content.numpy().data)
    return int.from_bytes(total.digest(), "little") >> 1
