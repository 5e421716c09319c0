"""The forward pass of a batch: eager, compiled or from a CUDA graph, with prepacked weights on a CPU."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from model.cli import notice
from model.device import compile_error
from model.inference.cuda_graphs import DecodeGraphs, can_capture, graph_batch_size
from model.inference.kv_cache import SlotManager, common_prefix_len
from model.inference.prepacked import prepack, use_prepacked
from model.inference.scheduler import Batch
from model.inference.sequence import Sequence
from model.linear import bucket_size
from model.model_minimind import MiniMindPreTrainedModel
from model.moe import Experts

MIN_PREFIX_SHARE = 1024  # keys that reading a common prefix once must save in a step; below, each row reads its own
# called from C++, on as many threads as there are
CPU_COMPILE_OPTIONS = {"cpp_wrapper": True, "cpp.dynamic_threads": True}


def compile_decoder(decoder: nn.Module) -> Callable:
    """The decoder compiled for any number of rows and keys, as long as its modules stay what they are."""
    if decoder.device.type != "cpu" or not isinstance(decoder, MiniMindPreTrainedModel):
        return torch.compile(decoder, dynamic=True)

    # Before each call torch.compile checks whatever a graph depends on (guards). Of our decoder only the arguments
    # need it: checking all attributes of its modules takes 8% of a step. Graphs are kept by code object; with one of
    # its own, no decoder runs the graph of another.
    def run(**arguments):
        return decoder(**arguments)

    run.__code__ = run.__code__.replace()
    options = {"cpp.threads": torch.get_num_threads(),  # named, it is no reason to compile again for another number
               "guard_filter_fn": lambda guards: [
                   not (guard.is_global or guard.orig_guard.source.is_unspecialized_nn_module()) for guard in guards]}
    return torch.compile(run, dynamic=True, fullgraph=True, options=CPU_COMPILE_OPTIONS | options)


def reason_not_to_compile(model: nn.Module) -> str | None:
    """Why the decoding step of `model` is not compiled; None if it can be."""
    if model.device.type == "cpu" and any(isinstance(module, Experts) for module in model.modules()):
        return "on a CPU the experts are computed one by one"
    return compile_error(model.device, CPU_COMPILE_OPTIONS if model.device.type == "cpu" else None)


class ModelRunner:
    """Runs batches through `model` and the cache of `slots`. `compile` and `graphs`: see `Engine`."""

    def __init__(self, model: nn.Module, slots: SlotManager, compile: bool, graphs: bool | None):
        self.model, self.slots, self.cache = model, slots, slots.cache
        self.compile, self.compiled, self._compiled_modules = compile, None, None
        self._marked_resize = 0  # of the cache
        if compile and (reason := reason_not_to_compile(model)):
            notice(f"compile: not possible here, continuing without it ({reason})")
            self.compile = False
        # Blocks compiled for training are specialised to one shape. Compiling others too, up to PyTorch's limit of
        # recompilations, would leave training eager.
        has_compiled_blocks = any(module._compiled_call_impl is not None for module in model.modules())
        self._eager_stance = "force_eager" if has_compiled_blocks else None
        use_graphs = can_capture(model, self.cache.keys[0].dtype, slots.max_batch) if graphs is None else graphs
        self.graphs = DecodeGraphs() if use_graphs else None
        self.prepack()

    def prepack(self) -> None:
        """Prepack the weights as they are now."""
        self.prepacked = prepack(self.model, self.cache.keys[0].dtype)
        if self.prepacked and self.graphs is not None:
            self.graphs.reset(self.cache.num_resizes)  # they read the weights that were packed before
        modules = [(type(module), module.training) for module in self.model.modules()]
        if self.compile and modules != self._compiled_modules:
            self.compiled, self._compiled_modules = compile_decoder(self.model.model), modules

    def run(self, batches: list[Batch]) -> Tensor:
        """Compute the tokens of all batches, into the cache. → logits [n, V] of the sampled rows of each, in order"""
        with use_prepacked(self.prepacked):
            return torch.cat([self._forward(batch) for batch in batches])

    def _forward(self, batch: Batch) -> Tensor:
        sequences, slots = batch.sequences, batch.slots
        # 1. Rows of one width. Padding repeats a row's last token at its own position, which writes what is there.
        width = max(map(len, batch.chunks))
        ids = [chunk + chunk[-1:] * (width - len(chunk)) for chunk in batch.chunks]
        positions = [[min(s.num_computed + i, s.num_computed + len(chunk) - 1) for i in range(width)]
                     for s, chunk in zip(sequences, batch.chunks, strict=True)]
        kv_len = max(row[-1] for row in positions) + 1
        # 2. A compiled or captured step is for few batch sizes: padding rows, in the next slots, fill it up.
        has_buckets = batch.is_decode and (self.compiled is not None or self.graphs is not None)
        if has_buckets:
            bucket = (bucket_size if self.graphs is None else graph_batch_size)(len(slots))
            num_padding = min(bucket, self.cache.num_slots) - len(slots)
            slots = [*slots, *range(len(slots), len(slots) + num_padding)]
            ids, positions = ids + [[0]] * num_padding, positions + [[self.cache.slot_len]] * num_padding
        ids, positions = torch.tensor([ids, positions], device=self.model.device)
        shared_prefix_len = self._shared_prefix_len(sequences) if batch.is_decode and not has_buckets else 0
        # 3. The decoder.
        is_compiled = batch.is_decode and self.compiled is not None
        if is_compiled and self._marked_resize != self.cache.num_resizes:
            for memory in (*self.cache.keys, *self.cache.values):  # a compiler takes sizes that are equal for one
                torch._dynamo.mark_static(memory, 1)  # the number of heads, never that of rows
            self._marked_resize = self.cache.num_resizes

        def forward_fn(ids: Tensor, positions: Tensor, kv_len: int) -> Tensor:
            mask = self.cache.prepare(slots, positions, kv_len, shared_prefix_len)
            decoder, stance = (self.compiled, None) if is_compiled else (self.model.model, self._eager_stance)
            with torch.compiler.set_stance(stance) if stance else nullcontext():
                return decoder(input_ids=ids, attention_mask=mask, position_ids=positions,
                               past_key_values=self.cache)[0]

        if batch.is_decode and self.graphs is not None:
            hidden = self.graphs.run(forward_fn, ids, positions, self.slots.slot_len_for(kv_len),
                                     self.cache.num_resizes)
        else:
            hidden = forward_fn(ids, positions, kv_len)
        for sequence, chunk in zip(sequences, batch.chunks, strict=True):
            sequence.num_computed += len(chunk)
        # 4. The head, for the last token of each row that has one to sample.
        rows = batch.sampled_rows
        ends = [len(batch.chunks[row]) - 1 for row in rows]
        return self.model.lm_head(hidden[:len(rows), 0] if batch.is_decode else hidden[rows, ends])

    def _shared_prefix_len(self, sequences: list[Sequence]) -> int:
        """How many tokens all sequences begin with, for attention to read once; 0 where that would not pay.

        Nor in half precision: products would round the scores, which PyTorch's own kernel keeps in fp32.
        """
        token_ids = [sequence.token_ids for sequence in sequences]
        prefix_len = common_prefix_len(min(token_ids), max(token_ids))  # all others are, in order, between these two
        pays = prefix_len * (len(sequences) - 1) >= MIN_PREFIX_SHARE and self.cache.keys[0].dtype == torch.float32
        return prefix_len if pays else 0
