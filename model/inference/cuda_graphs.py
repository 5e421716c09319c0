"""Decoding steps as CUDA graphs: a GPU runs the kernels of a small model faster than its host can launch them.

A graph is a list of kernels and addresses (CUDA C++ Programming Guide, "CUDA Graphs"): one launch repeats all of it, in
the same shapes on the same memory. So there are few shapes, their inputs are copied to where they were at the capture,
and all graphs are dropped when the memory of the cache has moved.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.cli import first_line
from model.inference.prepacked import has_no_hooks
from model.model_minimind import MiniMindPreTrainedModel
from model.moe import MAX_DENSE_TOKENS, can_use_grouped_mm

# A shape is captured at its second step: the first loads the kernels, which a capture cannot. On an H200 a decoding
# step of 64 M takes 11 ms without a graph, the capture 14 ms, and each step from then on 1.4 ms.
CAPTURE_AT_STEP = 2
ForwardFn = Callable[[Tensor, Tensor, int], Tensor]


def can_capture(model: nn.Module, dtype: torch.dtype, max_batch: int) -> bool:
    """Whether a step in `dtype` can be captured: our model on CUDA, no hooks, no expert sizes read by the host."""
    config, device = model.config, model.device.type
    if device != "cuda" or not isinstance(model, MiniMindPreTrainedModel) or not has_no_hooks(model):
        return False
    return not config.use_moe or max_batch <= MAX_DENSE_TOKENS or \
        can_use_grouped_mm(device, dtype, config.hidden_size, config.moe_intermediate_size)


def graph_batch_size(num_rows: int) -> int:
    """How many rows are captured for `num_rows`: 1, 8, 32, 64, 96, … A few more cost less than another capture."""
    return 1 if num_rows == 1 else 8 if num_rows <= 8 else -(-num_rows // 32) * 32


class DecodeGraphs:
    """Runs `forward_fn(ids, positions, kv_len)`, ids and positions [B, 1], from a graph where B and kv_len have one."""

    def __init__(self):
        self._is_refused = False
        self.reset(0)

    def reset(self, memory_version: int) -> None:
        """Drop all graphs."""
        self._memory_version, self._pool = memory_version, None
        self._num_steps: Counter[tuple[int, int]] = Counter()
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Callable[[], None]]] = {}

    def run(self, forward_fn: ForwardFn, ids: Tensor, positions: Tensor, kv_len: int, memory_version: int) -> Tensor:
        """What `forward_fn` returns; the next step overwrites it. `memory_version` changes when its memory moves."""
        if memory_version != self._memory_version:
            self.reset(memory_version)
        shape = len(ids), kv_len
        if shape in self._graphs:
            graph_ids, graph_positions, result, replay = self._graphs[shape]
            graph_ids.copy_(ids)
            graph_positions.copy_(positions)
            replay()
            return result
        self._num_steps[shape] += 1
        if self._num_steps[shape] == CAPTURE_AT_STEP and not self._is_refused:
            try:
                result, replay = self._capture(lambda: forward_fn(ids, positions, kv_len), ids.device)
            except RuntimeError as error:  # nothing has run: continue without graphs
                self._is_refused = True
                warnings.warn(f"decoding without CUDA graphs: {first_line(error)}", stacklevel=2)
            else:
                self._graphs[shape] = ids, positions, result, replay
                replay()
                return result
        return forward_fn(ids, positions, kv_len)

    def _capture(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """Capture `work` without running it. → its output, which each replay fills, and the replay function"""
        half, graph = torch.get_autocast_dtype("cuda"), torch.cuda.CUDAGraph()
        # what autocast still casts is cast in the graph: a cast kept from before would be of the weights as they were
        with torch.cuda.device(device), \
                torch.autocast("cuda", half, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False), \
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()  # they run one after another, so all may use the same memory
        return result, graph.replay
