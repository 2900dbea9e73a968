"""The engine of a GPU: CUDA graphs, so that the CPU launches one thing instead of hundreds.

It has not run on a GPU yet. What of it needs none is tested; the rest follows PyTorch's notes on CUDA graphs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detectors.engines.base import Comparison, EngineName
from detectors.engines.folding import folded
from detectors.engines.pytorch import channels_last

COUNTS = (1, 2, 4, 8)
"""Of so many pictures there is a graph each; more are compared in turns."""
WARM = 3
"""Times that a network runs before it is captured, so that libraries have set themselves up."""


class CudaGraphs:
    """A folded network in bfloat16, captured once for each of COUNTS and replayed. Satisfies `Engine`.

    What is found stays on the GPU. All graphs are captured at the start: no part pays for one.
    """

    def __init__(self, comparison: Comparison, size: int) -> None:
        self.device = torch.device("cuda")
        self.label = f"{EngineName.cudagraph_bf16} torch {torch.__version__} {torch.cuda.get_device_name()}"
        networks = channels_last(folded(comparison).round_networks().to(self.device))
        self._graphs = {count: _Graph(networks, count, size) for count in COUNTS}

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Sequence[Tensor]:
        """Compare up to eight pictures together, by the smallest graph that holds them."""
        each = [self._graphs[fitting(len(some))](some) for some in torch.split(pixels, COUNTS[-1])]
        return [torch.cat(found) for found in zip(*each, strict=True)]


class _Graph:
    """One captured run over `count` pictures size×size, from pinned memory to what is found."""

    @torch.inference_mode()
    def __init__(self, networks: Comparison, count: int, size: int) -> None:
        shape, layout = (count, 3, size, size), torch.channels_last
        self._staged = torch.empty(shape, dtype=torch.uint8, pin_memory=True, memory_format=layout)
        self._pixels = torch.empty(shape, dtype=torch.uint8, device="cuda", memory_format=layout).zero_()
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch's
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                networks(self._pixels)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other stations' threads may use the GPU meanwhile, which would end a capture of the default mode.
        with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            self._found = networks(self._pixels).found

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """At most `count` pictures; what is left of earlier ones in the other places is computed and passed over."""
        self._copied.synchronize()  # until the copy before has left the pinned memory
        self._staged[: len(pixels)] = pixels
        self._pixels.copy_(self._staged, non_blocking=True)
        self._copied.record()
        self._graph.replay()
        return [found[: len(pixels)].clone() for found in self._found]  # the next replay writes to the same place


def fitting(count: int) -> int:
    """The smallest of COUNTS that holds so many pictures, 1…8."""
    return next(holds for holds in COUNTS if holds >= count)
