"""Decoding steps as CUDA graphs: a GPU ends the kernels of a small model sooner than its host can start them.

A graph is a list of kernels and addresses (CUDA C++ Programming Guide, "CUDA Graphs"): one launch repeats all of it, in
the same shapes on the same memory. So a shape is captured once it has come often enough to pay for that, its inputs go
where they lay then, and whoever moves what it reads or writes must `reset`.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.cli import first_line
from model.inference.prepacked import has_no_hooks
from model.model_minimind import MiniMindPreTrainedModel
from model.moe import can_use_grouped_mm

WARMUP_STEPS = 16  # of a shape, until it is captured; they also load the kernels, which a capture could not
Read = Callable[[Tensor, Tensor, int], Tensor]


def can_capture(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a step in `dtype` is all on a CUDA device: a model of ours, no hook, no experts counted by the host."""
    config, kind = model.config, model.device.type
    if kind != "cuda" or not isinstance(model, MiniMindPreTrainedModel) or not has_no_hooks(model):
        return False
    one_kernel = can_use_grouped_mm(kind, dtype, config.hidden_size, config.moe_intermediate_size)
    # before Hopper, PyTorch itself takes the experts one by one and asks the device for their bounds
    return not config.use_moe or one_kernel and torch.cuda.get_device_capability(model.device) >= (9, 0)


class DecodeGraphs:
    """Runs `read(ids, positions, seen)` with ids, positions [B, 1], from a graph where it has one for B and `seen`."""

    def __init__(self):
        self._refused = False
        self.reset()

    def reset(self) -> None:
        """Drop all graphs: memory that they use is to move."""
        self._pool = None
        self._steps: Counter[tuple[int, int]] = Counter()
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Callable[[], None]]] = {}

    def run(self, read: Read, ids: Tensor, positions: Tensor, seen: int) -> Tensor:
        """What `read` returns; the next step overwrites it. `read` must be the same function of the same memory."""
        shape = len(ids), seen
        if shape in self._graphs:
            own_ids, own_positions, result, replay = self._graphs[shape]
            own_ids.copy_(ids)
            own_positions.copy_(positions)
            replay()
            return result
        self._steps[shape] += 1
        if self._steps[shape] == WARMUP_STEPS and not self._refused:
            try:
                result, replay = self._capture(lambda: read(ids, positions, seen), ids.device)
            except RuntimeError as error:  # nothing has run: go on without
                self._refused = True
                warnings.warn(f"decoding without CUDA graphs: {first_line(error)}", stacklevel=2)
            else:
                self._graphs[shape] = ids, positions, result, replay
                replay()
                return result
        return read(ids, positions, seen)

    def _capture(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """Note the kernels of `work`, which does not run yet. → its result to be, and what computes it, any time."""
        half, graph = torch.get_autocast_dtype("cuda"), torch.cuda.CUDAGraph()
        # weights are cast in the graph: a cast kept from before would be of the weights as they were
        with torch.cuda.device(device), \
                torch.autocast("cuda", half, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False), \
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()  # they run one after another, so all may use the same memory
        return result, graph.replay
