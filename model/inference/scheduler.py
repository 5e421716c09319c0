"""What runs next: admission to slots, decoding, chunked prefill, preemption.

A step runs at most two batches: the next token of every sequence that decodes, and a chunk of the prompts that are
still read, so that a long prompt never stalls the others (Orca, Yu et al. 2022; Sarathi, Agrawal et al. 2023).
"""

from typing import NamedTuple

from model.inference.kv_cache import SlotManager
from model.inference.sequence import Sequence


class Batch(NamedTuple):
    """The sequences of one forward pass: their slots, and the tokens of each to compute next."""

    sequences: list[Sequence]
    slots: list[int]
    chunks: list[list[int]]
    sampled_rows: list[int]  # rows whose chunk is the end of their tokens: their next token is sampled
    is_decode: bool  # one token per sequence, in the first slots


class Scheduler:
    """The queues: `waiting` sequences, in order, and the running ones, which have a slot."""

    def __init__(self, slots: SlotManager, prefill_chunk: int):
        self.slots, self.prefill_chunk = slots, prefill_chunk
        self.waiting: list[Sequence] = []

    def schedule(self) -> list[Batch]:
        """The batches of the next step, none where there is nothing to do."""
        self.slots.clock += 1
        self._admit()
        return [batch for batch in (self._schedule_decode(), self._schedule_prefill()) if batch.sequences]

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has finished or was cancelled."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.slots.free(sequence)

    def _admit(self) -> None:
        """Move waiting sequences to slots, in order, with copies of the prefixes that are in the cache."""
        slots = self.slots
        for sequence in list(self.waiting):
            # 1. Find a free slot that is long enough. Longer slots are fewer; they must hold the running sequences.
            num_tokens = len(sequence.token_ids) + 1
            if num_tokens > slots.cache.slot_len or slots.num_running == len(slots.slots):
                slot_len = slots.slot_len_for(max([num_tokens, *(len(s.token_ids) + 1 for s in slots.running)]))
                if slots.max_slots(slot_len) <= slots.num_running:
                    return  # wait until others have finished
                slots.resize(slot_len)
            # 2. If a running sequence is about to compute the same prefix, wait and copy it then.
            source, prefix_len = slots.match_prefix(sequence)
            if source is not None:
                self.waiting.remove(sequence)
                slots.allocate(sequence, source, prefix_len)

    def _schedule_decode(self) -> Batch:
        """All sequences with one token left to compute, moved to the first slots, so that they are one slice."""
        slots, num_decoding = self.slots, 0
        for slot in range(slots.num_running):
            sequence = slots.slots[slot]
            if len(sequence.token_ids) - sequence.num_computed == 1:
                if slot != num_decoding:
                    slots.swap(slot, num_decoding)
                num_decoding += 1
        self._ensure_capacity(max((len(s.token_ids) for s in slots.slots[:num_decoding]), default=0))
        sequences = slots.slots[:min(num_decoding, slots.num_running)]
        rows = list(range(len(sequences)))
        return Batch(sequences, rows, [sequence.token_ids[-1:] for sequence in sequences], rows, is_decode=True)

    def _schedule_prefill(self) -> Batch:
        """The next chunk of the first prompts that are not computed, as many as fit when padded to the longest."""
        batch, width = Batch([], [], [], [], is_decode=False), 0
        for slot, sequence in enumerate(self.slots.running):
            num_left = len(sequence.token_ids) - sequence.num_computed
            if num_left <= 1:
                continue
            width = max(width, min(num_left, self.prefill_chunk))
            if batch.sequences and (len(batch.sequences) + 1) * width > self.prefill_chunk:
                break
            if num_left <= self.prefill_chunk:
                batch.sampled_rows.append(len(batch.sequences))
            batch.sequences.append(sequence)
            batch.slots.append(slot)
            batch.chunks.append(sequence.token_ids[sequence.num_computed:sequence.num_computed + self.prefill_chunk])
        return batch

    def _ensure_capacity(self, num_tokens: int) -> None:
        """Make the slots hold `num_tokens`; if fewer of them then fit the memory, preempt the latest sequences."""
        if num_tokens > self.slots.cache.slot_len:
            slot_len = self.slots.slot_len_for(num_tokens)
            while self.slots.num_running > self.slots.max_slots(slot_len):
                self.waiting.insert(0, self.slots.preempt())
            self.slots.resize(slot_len)
