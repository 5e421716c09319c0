"""The key-value cache: one place a sequence, all of one length, in memory that is allocated once and bounded.

Places rather than pages (vLLM, Kwon et al. 2023): at this size a sequence's keys are a few MB, so moving or copying one
costs less than a step of the model, while pages would have to be gathered for every layer of every step, on a CPU by
copying. The running sequences stand in the first places, so a step reads them as one slice, up to the longest of them.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `places` sequences of up to `length` tokens: a layer's are [places, kv_heads, length + 1, D].

    At position `length` of a place a row may write that nobody asked for; nothing reads it.
    """

    def __init__(self, config, places: int, length: int, device: torch.device, dtype: torch.dtype):
        self.places, self.length = places, length
        shape = (places, config.num_key_value_heads, length + 1, config.head_dim)
        layers = range(config.num_hidden_layers)  # zeros: what is masked is multiplied by 0 and must not be nan
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in layers] for _ in range(2))

    def point(self, places: list[int], positions: Tensor, seen: int, shared_prefix_len: int = 0) -> Tensor:
        """Say where the next tokens go: `positions` [B, T] of B places, all below `seen`. → mask [B, 1, T, seen].

        `shared_prefix_len`: so many of the first keys and values are the same in all these places, once those tokens
        are there.
        """
        self.shared_prefix_len = shared_prefix_len
        row = range(places[0], places[0] + len(places))
        together = places == list(row)
        self._first = row.start if together else None  # then they are read where they are, else copied together
        self._rows = rows = torch.arange(row.start, row.stop, device=positions.device) if together else \
            torch.tensor(places, device=positions.device)
        heads = torch.arange(self.keys[0].shape[1], device=positions.device)
        starts = (rows[:, None] * len(heads) + heads) * (self.length + 1)
        self._write = (starts[..., None] + positions[:, None]).flatten()
        self._seen = seen
        return (torch.arange(seen, device=positions.device) <= positions[..., None])[:, None]

    def update(self, k: Tensor, v: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Store k, v [B, kv_heads, T, D] of a layer; → all keys and values of these places [B, kv_heads, seen, D]."""
        stored = []
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            memory.flatten(0, 2).index_copy_(0, self._write, new.flatten(0, 2).to(memory.dtype))
            read = self._rows if self._first is None else slice(self._first, self._first + len(k))
            stored.append(memory[read, :, :self._seen])
        return stored[0], stored[1]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a place to another."""
        for memory in (*self.keys, *self.values):
            memory[target, :, :tokens] = memory[source, :, :tokens]

    def swap(self, one: int, other: int, start: int, end: int) -> None:
        """Exchange the tokens from `start` to before `end` of two places."""
        for memory in (*self.keys, *self.values):
            kept = memory[one, :, start:end].clone()
            memory[one, :, start:end] = memory[other, :, start:end]
            memory[other, :, start:end] = kept

    def resize(self, places: int, length: int) -> None:
        """Change the shape, keeping what still fits. One layer at a time, so that memory never holds all twice."""
        kept, tokens = min(places, self.places), min(length, self.length)
        for memories in (self.keys, self.values):
            for layer, memory in enumerate(memories):
                memories[layer] = memory.new_zeros(places, memory.shape[1], length + 1, memory.shape[3])
                memories[layer][:kept, :, :tokens] = memory[:kept, :, :tokens]
        self.places, self.length = places, length
