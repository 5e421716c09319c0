"""The key-value cache: one slot per sequence, all of one length, in bounded memory.

Slots rather than pages (vLLM, Kwon et al. 2023): at this size a sequence's keys are a few MB, so moving or copying them
costs less than a step of the model, while pages would have to be gathered for every layer of every step, on a CPU by
copying.
"""

import torch
from torch import Tensor

from model.inference.sequence import Sequence

MIN_SLOT_LEN = 256  # tokens of a slot at first; it doubles when a sequence outgrows it
MIN_PREFIX_REUSE = 8  # tokens; a shorter common prefix is computed again


class KVCache:
    """Keys and values of all slots: a layer's are [num_slots, kv_heads, slot_len + 1, D].

    Position `slot_len` of a slot is for padding rows to write to; nothing reads it.
    """

    def __init__(self, config, device: torch.device, dtype: torch.dtype):
        self.num_slots = self.slot_len = 0
        self.num_resizes = 0  # each moves the memory
        shape, layers = (0, config.num_key_value_heads, 1, config.head_dim), range(config.num_hidden_layers)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in layers] for _ in range(2))

    def prepare(self, slots: list[int], positions: Tensor, kv_len: int, shared_prefix_len: int = 0) -> Tensor:
        """Set where the next tokens go: `positions` [B, T] of B slots, all below `kv_len`. → mask [B, 1, T, kv_len]

        `shared_prefix_len`: so many of the first keys and values are the same in all these slots, once the tokens are
        there; attention then reads them once.
        """
        self.shared_prefix_len = shared_prefix_len
        consecutive = range(slots[0], slots[0] + len(slots))
        if slots == list(consecutive):  # a slice, read in place
            index = torch.arange(consecutive.start, consecutive.stop, device=positions.device)
            self._slots = slots[0]  # the first one
        else:  # gathered into a copy
            self._slots = index = torch.tensor(slots, device=positions.device)
        heads = torch.arange(self.keys[0].shape[1], device=positions.device)
        row_start = (index[:, None] * len(heads) + heads) * (self.slot_len + 1)
        self._write_index = (row_start[..., None] + positions[:, None]).flatten()
        self._kv_len = kv_len
        return (torch.arange(kv_len, device=positions.device) <= positions[..., None])[:, None]

    def update(self, k: Tensor, v: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Store k, v [B, kv_heads, T, D] of a layer. → all keys and values of these slots [B, kv_heads, kv_len, D]"""
        rows = self._slots
        if isinstance(rows, int):
            rows = slice(rows, rows + len(k))
        stored = []
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            memory.flatten(0, 2).index_copy_(0, self._write_index, new.flatten(0, 2).to(memory.dtype))
            stored.append(memory[rows, :, :self._kv_len])
        return stored[0], stored[1]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` of a slot to another."""
        for memory in (*self.keys, *self.values):
            memory[target, :, :num_tokens] = memory[source, :, :num_tokens]

    def swap(self, a: int, b: int, start: int, end: int) -> None:
        """Exchange the tokens from `start` to before `end` of two slots."""
        for memory in (*self.keys, *self.values):
            saved = memory[a, :, start:end].clone()
            memory[a, :, start:end] = memory[b, :, start:end]
            memory[b, :, start:end] = saved

    def resize(self, num_slots: int, slot_len: int) -> None:
        """Change the shape, keeping what still fits. One layer at a time, so that memory never holds all twice."""
        num_kept, num_tokens = min(num_slots, self.num_slots), min(slot_len, self.slot_len)
        for memories in (self.keys, self.values):
            for layer, memory in enumerate(memories):  # zeros: what is masked is multiplied by 0 and must not be NaN
                memories[layer] = memory.new_zeros(num_slots, memory.shape[1], slot_len + 1, memory.shape[3])
                memories[layer][:num_kept, :, :num_tokens] = memory[:num_kept, :, :num_tokens]
        self.num_slots, self.slot_len = num_slots, slot_len
        self.num_resizes += 1


class SlotManager:
    """Which sequence's keys and values are in which slot.

    Running sequences have the first slots, so a decoding step reads one slice. A finished sequence keeps its slot until
    that is needed: a later prompt with the same prefix starts from a copy of it.
    """

    def __init__(self, cache: KVCache, max_batch: int, max_tokens: int, max_seq_len: int):
        self.cache, self.max_batch, self.max_tokens, self.max_seq_len = cache, max_batch, max_tokens, max_seq_len
        self.slots: list[Sequence | None] = []
        self.num_running = 0
        self.num_cached_tokens = 0  # copied instead of computed, since the start
        self.clock = 0  # in steps of the engine: the slot that was freed first is taken first

    @property
    def running(self) -> list[Sequence]:
        return self.slots[:self.num_running]

    def match_prefix(self, sequence: Sequence) -> tuple[int | None, int]:
        """The slot with the longest prefix of the sequence and its length; None if a running prompt will have more."""
        best_len, source, future_len = 0, 0, 0
        limit = len(sequence.token_ids) - 1  # the last token is always computed: its logits are needed
        for slot, other in enumerate(self.slots):
            if other is None:
                continue
            prefix_len = min(common_prefix_len(sequence.token_ids, other.token_ids), limit)
            if prefix_len < MIN_PREFIX_REUSE:
                continue
            computed_len = min(prefix_len, other.num_computed)
            if computed_len > best_len:
                best_len, source = computed_len, slot
            if slot < self.num_running:
                future_len = max(future_len, min(prefix_len, len(other.prompt_ids)))
        return (None if future_len > best_len else source), best_len

    def allocate(self, sequence: Sequence, source: int, prefix_len: int) -> None:
        """Give a sequence the slot after the running ones, with `prefix_len` tokens copied from the slot `source`."""
        target, slots = self.num_running, self.slots
        # 1. Evict the sequence that finished first; or none, if the source is finished and nobody else needs it.
        victim = min(range(target, len(slots)), key=lambda slot: (slots[slot].freed_at if slots[slot] else -1, slot))
        if source >= target and prefix_len and (
                prefix_len == slots[source].num_computed or len(slots) == target + 1):
            victim = source
        if victim != target:
            self.swap(victim, target)
            source = target if source == victim else victim if source == target else source
        # 2. Copy the prefix.
        if prefix_len and source != target:
            self.cache.copy(source, target, prefix_len)
        slots[target] = sequence
        self.num_running += 1
        sequence.num_computed = prefix_len
        sequence.num_cached_tokens = max(sequence.num_cached_tokens, min(prefix_len, len(sequence.prompt_ids)))
        self.num_cached_tokens += prefix_len

    def free(self, sequence: Sequence) -> None:
        """End a running sequence: the last running one moves to its slot, and it keeps the one behind them."""
        sequence.freed_at, sequence.token_counts = self.clock, None
        self.num_running -= 1
        self.swap(self.slots.index(sequence), self.num_running)

    def preempt(self) -> Sequence:
        """Take the slot and all that was computed away from the last running sequence. → the sequence"""
        self.num_running -= 1
        sequence, self.slots[self.num_running] = self.slots[self.num_running], None
        return sequence

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots; only where they differ is there something to move."""
        if a != b:
            first, second = self.slots[a], self.slots[b]
            tokens_a, tokens_b = (s.token_ids[:s.num_computed] if s else [] for s in (first, second))
            self.cache.swap(a, b, common_prefix_len(tokens_a, tokens_b), max(len(tokens_a), len(tokens_b)))
            self.slots[a], self.slots[b] = second, first

    def resize(self, slot_len: int) -> None:
        """Make all slots `slot_len` long, and as many as fit the memory.

        The running sequences must fit them, and when slots become shorter, all of them must be running.
        """
        num_slots = self.max_slots(slot_len)
        if (num_slots, slot_len) != (self.cache.num_slots, self.cache.slot_len):
            self.cache.resize(num_slots, slot_len)
            self.slots = (self.slots + [None] * num_slots)[:num_slots]

    def reset(self) -> None:
        """Forget what finished sequences have computed."""
        self.slots = [None] * len(self.slots)

    def slot_len_for(self, num_tokens: int) -> int:
        """The slot length that holds `num_tokens`: it doubles, so that the total cost of growing stays small."""
        slot_len = min(MIN_SLOT_LEN, self.max_seq_len)
        while slot_len < num_tokens:
            slot_len *= 2
        return min(slot_len, self.max_seq_len)

    def max_slots(self, slot_len: int) -> int:
        """How many slots of this length fit the memory."""
        return min(self.max_batch, self.max_tokens // slot_len)


def common_prefix_len(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
