"""Triton where it is installed; torch for CPUs comes without it."""

from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:  # ``available`` is False then
    triton = tl = None  # pyright: ignore[reportConstantRedefinition]


def jit(function: Callable[..., Any]) -> Any:
    """Return ``function`` as a Triton kernel; without Triton it can be defined, not launched."""
    return function if triton is None else triton.jit(function)


__all__ = ["jit", "tl"]
