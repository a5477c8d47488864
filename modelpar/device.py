"""The device of a process, its threads and memory, and what torch.compile does on it."""

import ctypes
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from modelpar import environment
from modelpar.errors import SettingsError, one_line

M_TRIM_THRESHOLD: Final = -1  # malloc.h
M_MMAP_MAX: Final = -4  # malloc.h


# -- GPUs ----------------------------------------------------------------------------------------


def choose_device(device: str, local_processes: int, *, share_gpu: bool | None = None) -> str:
    """Return ``cuda`` or ``cpu`` for the setting ``device``; auto: GPUs if each rank has one.

    ``local_processes`` is the number of ranks on this host.  With ``share_gpu`` one GPU is enough
    for all of them; None: the command has no such setting.  Raises SettingsError if there are
    fewer GPUs than the settings need.
    """
    found = torch.cuda.device_count()
    if share_gpu and (device == "cpu" or not found):
        why = "device=cpu uses none" if device == "cpu" else "this host has none"
        raise SettingsError(f"share_gpu=true: needs a GPU, and {why}; use share_gpu=false")
    enough = share_gpu or found >= local_processes
    if device == "auto":
        return "cuda" if enough else "cpu"
    if device == "cuda" and not enough:
        fewer = ""
        if found and share_gpu is not None:
            fewer = "columns=1 for one GPU, share_gpu=true to share it, or "
        raise SettingsError(
            f"device=cuda: {found} GPU{'s' * (found != 1)} for {local_processes} processes on "
            f"this host; use {fewer}device=cpu"
        )
    return device


def unused_gpus(device: str, local_processes: int) -> str:
    """Return a note if ``device=auto`` finds too few GPUs to use any, or an empty string."""
    found = torch.cuda.device_count()
    if device != "auto" or not 0 < found < local_processes:
        return ""
    return (
        f"this host has {found} GPU{'s' * (found > 1)} for {local_processes} processes, so they "
        "run on CPUs; share_gpu=true lets them share GPUs"
    )


def check_precision(device: str, precision: str) -> None:
    """Raise SettingsError for bfloat16 on a GPU that only emulates it."""
    native = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and not native:
        raise SettingsError("precision=bfloat16: this GPU does not support it; use float32")


def set_up(
    kind: str, local_rank: int = 0, *, tf32: bool = False, deterministic: bool = False
) -> torch.device:
    """Return the device of a rank, configured for speed; ``kind`` is ``cuda`` or ``cpu``.

    ``tf32`` allows a GPU to round the inputs of float32 products.  ``deterministic`` excludes
    its kernels that add in an order that changes, and torch warns where it has no other.
    """
    if kind == "cpu":
        # By default glibc returns large buffers to the system at each step.  That cost a third of
        # a step (224 pixels, two processes, two cores: 21 against 30 images/s).
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
        return torch.device(kind)
    # set_device needs an index.  There are fewer GPUs than ranks where ranks share them.
    device = torch.device(kind, local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # the default one cannot be recorded
    torch.backends.cudnn.benchmark = not deterministic  # shapes never change
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32  # the default of torch rounds convolutions
    return device


# -- threads and memory --------------------------------------------------------------------------


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def set_threads(processes: int, threads: int | None = None) -> int:
    """Set the number of torch's threads in this process and return it.

    ``threads`` None: OMP_NUM_THREADS if that is more than 1, which torchrun sets by default;
    otherwise the cores that this process may use, divided by the host's ``processes``.  At most
    OMP_THREAD_LIMIT: convolutions of torch 2.14 for CPUs have wrong gradients where OpenMP gives
    them fewer threads than torch has.
    """
    if threads is None:
        given = environment.integer("OMP_NUM_THREADS", 1)
        threads = given if given > 1 else max(1, num_cores() // processes)
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isascii() and limit.isdecimal() and int(limit):
        threads = min(threads, int(limit))
    torch.set_num_threads(threads)
    return threads


def oversubscription_warning(threads: int) -> str:
    """Return a warning if this host's ranks have more threads than cores, or an empty string."""
    processes, cores = environment.read().local_size, num_cores()
    if threads * processes <= cores:
        return ""
    fix = "unset threads and OMP_NUM_THREADS" if threads > 1 else "start fewer processes"
    each = f"{threads} thread{'s' * (threads > 1)} each"
    here = f"{cores} core{'s' * (cores > 1)}"
    return f"{processes} processes with {each} oversubscribe {here}; {fix}"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch ran out of memory, of a GPU or of the host."""
    found = re.search("out of memory|can't allocate memory", str(error))
    return isinstance(error, torch.OutOfMemoryError) or found is not None


def memory(device: torch.device) -> str:
    """Return the name of ``device``, for a GPU with its peak and total memory."""
    if device.type != "cuda":
        return f"this host ({device})"
    peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    return f"{device} ({peak / 1e6:.0f} of {total / 1e6:.0f} MB)"


# -- torch.compile -------------------------------------------------------------------------------

MAX_DIFFERENCE: Final = {  # relative, by dtype: far above rounding, far below a wrong result
    torch.float64: 1e-10,
    torch.float32: 1e-3,  # of a GPU with tf32 too
    torch.bfloat16: 0.05,
}


class CompileError(Exception):
    """torch.compile failed, or the compiled function computes something else."""


def check_compiled(
    name: str, compiled: Callable[..., Tensor], eager: Callable[..., Tensor], *examples: Tensor
) -> None:
    """Compare ``compiled`` with ``eager`` on ``examples``: values, and gradients if there are any.

    Raises CompileError, with ``name``, if they differ or the compiler fails.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # CUDA without a GPU
    try:
        found = _values_and_gradients(compiled, examples)
    except Exception as error:
        raise CompileError(f"{name}: {one_line(error)[:160]}") from error
    wanted = _values_and_gradients(eager, examples)
    for kind, value in wanted.items():
        if kind not in found:
            raise CompileError(f"{name}: the compiled version has no {kind}")
        difference = float((found[kind] - value).norm() / value.norm())
        if not difference <= MAX_DIFFERENCE[value.dtype]:
            raise CompileError(
                f"{name}: the {kind} of the compiled version differs by {difference:.1e} "
                "from the eager one"
            )


def _values_and_gradients(
    function: Callable[..., Tensor], examples: Sequence[Tensor]
) -> dict[str, Tensor]:
    inputs = [example.clone().requires_grad_() for example in examples]
    value = function(*inputs)
    found = {"value": value.detach()}
    if value.requires_grad:
        grads = torch.autograd.grad(value, inputs, value.detach())
        found |= {f"gradient {number}": grad for number, grad in enumerate(grads, 1)}
    return found
