"""The names of the contenders; ``bench.steps`` knows how each is made."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Kind:
    """What a contender is; ``devices`` are those where it is timed by default."""

    what: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    one_size: bool = False  # by default it is timed with the first batch size only
    processes: int = 1
    share: float = 1.0  # of the net's products that its processes compute


_GPU: Final = ("cuda",)
CONTENDERS: Final = {
    "plain": Kind("one process, torch's own layers, optimizer and allocator", one_size=True),
    "plain_compiled": Kind(
        "plain made fast: norms as shifted slices, channels_last, fused SGD, torch.compile", _GPU
    ),
    "plain_reduce_overhead": Kind(
        'the same with torch.compile(mode="reduce-overhead")', _GPU, one_size=True
    ),
    "torchvision": Kind(
        "torchvision's AlexNet, another net, made fast in the same way", _GPU, one_size=True
    ),
    "layers": Kind("one process, our layers"),
    "column": Kind(
        "one column that receives a copy of what it sends: the pair's upper bound", _GPU, share=0.5
    ),
    "ddp": Kind("data parallel: DistributedDataParallel, our layers", ("cpu",), processes=2),
    "tensor_parallel": Kind(
        "torch's tensor parallelism for fc6 and fc7, our layers", ("cpu",), processes=2
    ),
    "in_turn": Kind(
        "the two columns, crossing.overlap=false crossing.chunks=1", ("cpu",), processes=2
    ),
    "pair": Kind("the two columns", processes=2),
}
