"""The key-value cache: one place a sequence, all of one length, in memory that is allocated once and bounded.

Places rather than pages (vLLM, Kwon et al. 2023): at this size a sequence's keys are a few MB, so moving or copying one
costs less than a step of the model, while pages would have to be gathered for every layer of every step, on a CPU by
copying. The running sequences stand in the first places, so a step reads them as one slice, up to the longest of them.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `places` sequences of up to `length` tokens: a layer's are [places, length, kv_heads, D]."""

    def __init__(self, config, places: int, length: int, device: torch.device, dtype: torch.dtype):
        self.places, self.length = places, length
        shape = (places, length, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)  # zeros: what is masked is multiplied by 0 and must not be nan
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in layers] for _ in range(2))

    def point(self, places: list[int], positions: Tensor, seen: int) -> Tensor:
        """Say where the next tokens go: `positions` [B, T] of B places, all below `seen`. → mask [B, 1, T, seen]."""
        rows = torch.tensor(places, device=positions.device)
        together = places == list(range(places[0], places[0] + len(places)))
        self._read = slice(places[0], places[-1] + 1) if together else rows  # a slice is read where it is
        self._write = (rows[:, None] * self.length + positions).flatten()
        self._seen = seen
        return (torch.arange(seen, device=positions.device) <= positions[..., None])[:, None]

    def update(self, k: Tensor, v: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Store k, v [B, kv_heads, T, D] of a layer; → all keys and values of these places [B, kv_heads, seen, D]."""
        stored = []
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            new = new.transpose(1, 2).flatten(0, 1).to(memory.dtype)
            memory.flatten(0, 1).index_copy_(0, self._write, new)
            stored.append(memory[self._read, :self._seen].transpose(1, 2))
        return stored[0], stored[1]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a place to another."""
        for memory in (*self.keys, *self.values):
            memory[target, :tokens] = memory[source, :tokens]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first `tokens` of two places."""
        for memory in (*self.keys, *self.values):
            memory[[one, other], :tokens] = memory[[other, one], :tokens]

    def resize(self, places: int, length: int) -> None:
        """Change the shape, keeping what still fits. One layer at a time, so that memory never holds all twice."""
        kept, tokens = min(places, self.places), min(length, self.length)
        for memories in (self.keys, self.values):
            for layer, memory in enumerate(memories):
                memories[layer] = memory.new_zeros(places, length, *memory.shape[2:])
                memories[layer][:kept, :tokens] = memory[:kept, :tokens]
        self.places, self.length = places, length
