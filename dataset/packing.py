"""Token sequences → fixed-size rows with document boundaries.

A document of n tokens asks n - 1 questions (token i → token i + 1), so a row of T positions holds T questions and no
position predicts across documents. A piece is a run of one document's questions: its start in the token file and its
length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IGNORE = -100  # the label of a position without a question
WINDOW = 1 << 18  # pieces packed at a time, which bounds memory
PADDING = 256  # positions of a document of padding: attention to nothing shall cost next to nothing


@dataclass
class Rows:
    """Which pieces make up a row: `row_offsets[r]:row_offsets[r + 1]` are row r's. Start and length are in tokens."""

    start: np.ndarray  # [pieces] int64
    length: np.ndarray  # [pieces] int32
    row_offsets: np.ndarray  # [rows + 1] int64

    def __len__(self) -> int:
        return len(self.row_offsets) - 1


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, by best-fit decreasing: longest piece first, into the fullest row that still takes it.

    The free sizes in use are the bits of one integer, so the best fit is its lowest bit at or above the length.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows_with_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    in_use, rows = 0, 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = in_use >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_free[free].pop()
            if not rows_with_free[free]:
                in_use ^= 1 << free
        else:
            free, row, rows = capacity, rows, rows + 1
        row_of[piece] = row
        rows_with_free[free - length].append(row)
        in_use |= 1 << (free - length)
    return row_of


def pack(start: np.ndarray, length: np.ndarray, capacity: int, packing: bool = True) -> Rows:
    """Pieces → rows of `capacity` positions; with `packing` off every piece has a row of its own."""
    if not packing:
        return Rows(start, length.astype(np.int32), np.arange(len(start) + 1, dtype=np.int64))
    row_of, rows = np.empty(len(start), np.int64), 0
    for begin in range(0, len(start), WINDOW):
        window = best_fit(length[begin:begin + WINDOW], capacity)
        row_of[begin:begin + WINDOW] = window + rows
        rows += int(window.max()) + 1
    order = np.argsort(row_of, kind="stable")
    first = np.searchsorted(row_of[order], np.arange(rows + 1))
    return Rows(start[order], length[order].astype(np.int32), first.astype(np.int64))


def split_long(start: np.ndarray, questions: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents → pieces of at most `capacity` questions, the last one shorter; no question is lost."""
    pieces = -(-questions // capacity)
    document = np.repeat(np.arange(len(start)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_start = start[document] + number * capacity
    return piece_start, np.minimum(questions[document] - number * capacity, capacity)


def cut_at_answers(start: np.ndarray, questions: np.ndarray, mask: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Shorten conversations that exceed a row to the last whole answer that fits. → (questions kept, answers cut).

    Only where not even the first answer fits is it cut in the middle, and counted.
    """
    kept, answers_cut = questions.copy(), 0
    for i in np.flatnonzero(questions > capacity).tolist():
        said = mask[start[i] + 1:start[i] + capacity + 2]  # of each question's answer, and of one more
        last_of_answer = np.flatnonzero((said[:-1] != 0) & (said[1:] == 0))
        kept[i] = last_of_answer[-1] + 1 if len(last_of_answer) else capacity
        answers_cut += not len(last_of_answer)
    return kept, answers_cut


def collate(rows: Rows, wanted: np.ndarray, tokens: np.ndarray, mask: np.ndarray | None, capacity: int,
            max_sequences: int) -> dict[str, torch.Tensor]:
    """Rows `wanted` → a batch: what `MiniMindForCausalLM.forward` takes, and `targets` [M] at its `logits_indices` [M].

    Row -1 is an empty one, to fill a batch up.
    `cu_seqlens` always has len(wanted) · (max_sequences + 1) + 1 bounds, the last ones repeated, so shapes are
    constant.
    """
    B = len(wanted)
    ids, positions = np.zeros((B, capacity), np.int64), np.zeros((B, capacity), np.int64)
    targets, real = np.full((B, capacity), IGNORE, np.int64), np.zeros((B, capacity), np.int64)
    bounds = [0]
    for b, row in enumerate(wanted.tolist()):
        at = 0
        for piece in range(rows.row_offsets[row], rows.row_offsets[row + 1]) if row >= 0 else ():
            start, n = int(rows.start[piece]), int(rows.length[piece])
            ids[b, at:at + n] = tokens[start:start + n]
            after = slice(start + 1, start + n + 1)
            targets[b, at:at + n] = tokens[after]
            if mask is not None:
                targets[b, at:at + n][mask[after] == 0] = IGNORE
            positions[b, at:at + n] = np.arange(n)
            real[b, at:at + n] = 1
            at += n
            bounds.append(b * capacity + at)
        if at < capacity:
            bounds.append((b + 1) * capacity)
    bounds += [B * capacity] * (B * (max_sequences + 1) + 1 - len(bounds))
    logits_indices = np.flatnonzero(targets != IGNORE)
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": real,
             "cu_seqlens": np.array(bounds, np.int32), "logits_indices": logits_indices,
             "targets": targets.ravel()[logits_indices]}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def pack_shared_prefix(trees: list[tuple[Sequence[int], list[Sequence[int]]]], size: int) -> dict[str, torch.Tensor]:
    """Prompts, each with answers to it → one row [1, size] in which a prompt stands once, before all of its answers.

    A batch like `collate`'s, in which every token of an answer is a target [M], in order. Answers see their prompt and
    themselves: attention is computed over documents, bounded by `cu_seqlens`, in which each answer has its own copy of
    the prompt. `expand_index` [S] says which position of the row each token of these is, `gather_index` [size] where in
    them the result of each position is. All else in the model is computed once per position.
    """
    ids, positions, targets, logits_indices, expand_index, gather_index, bounds, used = [], [], [], [], [], [], [0], 0
    for prompt, *answers in ([np.asarray(part, np.int64) for part in (prompt, *answers)] for prompt, answers in trees):
        trunk = np.arange(used, used + len(prompt))
        ids.append(prompt)
        positions.append(trunk - used)
        gather_index.append(bounds[-1] + trunk - used)
        used += len(prompt)
        for answer in answers:
            own = np.arange(used, used + len(answer) - 1)  # the last token asks nothing
            ids.append(answer[:-1])
            positions.append(len(prompt) + own - used)
            logits_indices += [trunk[-1:], own]
            targets.append(answer)
            expand_index += [trunk, own]
            gather_index.append(bounds[-1] + len(prompt) + own - used)
            used += len(own)
            bounds.append(bounds[-1] + len(prompt) + len(own))
    padding = np.zeros(size - used, np.int64)
    expand_index.append(np.arange(used, size))
    gather_index.append(bounds[-1] + expand_index[-1] - used)
    bounds += [*range(bounds[-1] + PADDING, bounds[-1] + len(padding), PADDING), bounds[-1] + len(padding)]
    parts = {"input_ids": [*ids, padding], "position_ids": [*positions, padding], "logits_indices": logits_indices,
             "attention_mask": [np.ones(used, np.int64), padding], "targets": targets,
             "expand_index": expand_index, "gather_index": gather_index}
    batch = {name: torch.from_numpy(np.concatenate([padding[:0], *part])) for name, part in parts.items()}
    rows = {name: batch[name][None] for name in ("input_ids", "position_ids", "attention_mask")}
    return batch | rows | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
