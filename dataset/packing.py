"""Documents → rows of a fixed number of positions, with the bounds of their documents.

A document of n tokens has n - 1 positions: position i holds token i and predicts token i + 1, so no position predicts
across documents. A sequence is a run of positions of one document: its start in the token file, and its length.
"""

from dataclasses import dataclass

import numpy as np
import torch

IGNORE = -100  # the label of a position without a target
WINDOW = 1 << 18  # documents packed at a time, which bounds memory


@dataclass
class Rows:
    """The sequences of each row: row r has sequences `row_offsets[r]` to `row_offsets[r + 1]`."""

    start: np.ndarray  # [sequences] int64, in the token file
    length: np.ndarray  # [sequences] int32, in positions
    row_offsets: np.ndarray  # [rows + 1] int64

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def sum_per_row(self, values: np.ndarray) -> np.ndarray:
        """values [sequences] → their sums [rows] int32."""
        return np.add.reduceat(values, self.row_offsets[:-1], dtype=np.int32)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each sequence by best-fit decreasing: the longest first, into the fullest row that still takes it.

    The free sizes in use are the bits of one integer, so the best fit is its lowest bit at or above the length.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows_by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    free_sizes, num_rows = 0, 0
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sequence])
        large_enough = free_sizes >> length
        if large_enough:
            free = length + (large_enough & -large_enough).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_sizes ^= 1 << free
        else:
            free, row, num_rows = capacity, num_rows, num_rows + 1
        row_of[sequence] = row
        rows_by_free[free - length].append(row)
        free_sizes |= 1 << (free - length)
    return row_of


def pack(start: np.ndarray, length: np.ndarray, capacity: int, packing: bool = True, split: bool = False) -> Rows:
    """Documents → rows of at most `capacity` positions; without `packing`, one sequence per row.

    With `split`, a document of more positions continues in the next sequence; else none may have more.
    """
    num_sequences = int(np.sum(-(-length // capacity))) if split else len(start)
    starts, lengths = np.empty(num_sequences, np.int64), np.empty(num_sequences, np.int32)  # row by row
    offsets, filled = [np.zeros(1, np.int64)], 0  # of rows
    for begin in range(0, len(start), WINDOW):
        window = start[begin:begin + WINDOW], length[begin:begin + WINDOW]
        sequence_start, sequence_length = split_long(*window, capacity) if split else window
        row_of = best_fit(sequence_length, capacity) if packing else np.arange(len(sequence_start))
        order = np.argsort(row_of, kind="stable")
        placed = slice(filled, filled + len(order))
        starts[placed], lengths[placed], filled = sequence_start[order], sequence_length[order], placed.stop
        offsets.append(offsets[-1][-1] + np.cumsum(np.bincount(row_of)))
    return Rows(starts, lengths, np.concatenate(offsets))


def split_long(start: np.ndarray, length: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents → sequences of at most `capacity` positions, of each document only the last one shorter."""
    counts = -(-length // capacity)
    document = np.repeat(np.arange(len(start)), counts)
    offset = capacity * (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts))
    return start[document] + offset, np.minimum(length[document] - offset, capacity)


def truncate_at_answers(start: np.ndarray, length: np.ndarray, mask: np.ndarray,
                        capacity: int) -> tuple[np.ndarray, int]:
    """Shorten each conversation of more than `capacity` positions to the last answer that fits as a whole.

    → the lengths, and the number of conversations whose first answer does not fit and is cut.
    """
    truncated, num_cut_answers = length.copy(), 0
    for i in np.flatnonzero(length > capacity).tolist():
        is_target = mask[start[i] + 1:start[i] + capacity + 2] != 0  # of the positions that fit, and of one more
        answer_ends = np.flatnonzero(is_target[:-1] & ~is_target[1:])
        truncated[i] = answer_ends[-1] + 1 if len(answer_ends) else capacity
        num_cut_answers += not len(answer_ends)
    return truncated, num_cut_answers


def collate(rows: Rows, row_ids: np.ndarray, tokens: np.ndarray, mask: np.ndarray | None, capacity: int,
            max_sequences: int) -> dict[str, torch.Tensor]:
    """The rows `row_ids` [B] as the arguments of `MiniMindForCausalLM.forward`, T = `capacity`, and the `targets` [M].

    `targets` [M] are the labels at the flat positions `logits_indices` [M]. Row -1 is empty, to fill a batch up.
    `cu_seqlens` has B · (max_sequences + 1) + 1 bounds, the last one repeated, so that all shapes but M are constant.
    """
    B = len(row_ids)
    ids, positions = np.zeros((B, capacity), np.int64), np.zeros((B, capacity), np.int64)
    targets, token_mask = np.full((B, capacity), IGNORE, np.int64), np.zeros((B, capacity), np.int64)
    bounds = [0]
    for b, row in enumerate(row_ids.tolist()):
        used = 0
        for sequence in range(rows.row_offsets[row], rows.row_offsets[row + 1]) if row >= 0 else ():
            start, n = int(rows.start[sequence]), int(rows.length[sequence])
            columns, shifted = slice(used, used + n), slice(start + 1, start + n + 1)
            ids[b, columns] = tokens[start:start + n]
            targets[b, columns] = tokens[shifted]
            if mask is not None:
                targets[b, columns][mask[shifted] == 0] = IGNORE
            positions[b, columns] = np.arange(n)
            token_mask[b, columns] = 1
            used += n
            bounds.append(b * capacity + used)
        if used < capacity:
            bounds.append((b + 1) * capacity)
    bounds += [B * capacity] * (B * (max_sequences + 1) + 1 - len(bounds))
    logits_indices = np.flatnonzero(targets != IGNORE)
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": token_mask,
             "cu_seqlens": np.array(bounds, np.int32), "logits_indices": logits_indices,
             "targets": targets.ravel()[logits_indices]}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
