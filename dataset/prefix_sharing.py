"""Several sequences that begin alike, their common prefix computed once: preference pairs, and groups of rollouts."""

from collections.abc import Sequence

import numpy as np
import torch

PAD_DOC_LEN = 256  # padding is cut into documents of this length, so that attention within it costs next to nothing


def pack_shared_prefix(groups: list[tuple[Sequence[int], list[Sequence[int]]]], size: int) -> dict[str, torch.Tensor]:
    """(prefix, its suffixes) of each group → one row [1, size]: a prefix once, then all of its suffixes.

        row:        prefix  suffix A  suffix B  padding       what everything but attention computes, once per token
        documents:  prefix  suffix A | prefix  suffix B | …   what attention sees, bounded by `cu_seqlens`

    A batch as from `packing.collate`; every token of a suffix is a target [M], in order. `expand_index` [S]: of each
    token of the documents, its position in the row. `gather_index` [size]: of each position of the row, where in the
    documents its result is. The last token of a suffix predicts nothing and is left out of the row.
    """
    ids, positions, targets, logits_indices, expand_index, gather_index = [], [], [], [], [], []
    used, bounds = 0, [0]  # positions of the row so far, ends of the documents
    for group in groups:
        prefix, suffixes = np.asarray(group[0], np.int64), [np.asarray(suffix, np.int64) for suffix in group[1]]
        P = len(prefix)
        # 1. The prefix, once. Its results are read from the first of its documents.
        prefix_at = np.arange(used, used + P)
        ids.append(prefix)
        positions.append(prefix_at - used)
        gather_index.append(bounds[-1] + prefix_at - used)
        used += P
        # 2. Each suffix, and the document that it makes with a copy of the prefix.
        for suffix in suffixes:
            suffix_at = np.arange(used, used + len(suffix) - 1)
            ids.append(suffix[:-1])
            positions.append(P + suffix_at - used)
            targets.append(suffix)
            logits_indices += [prefix_at[-1:], suffix_at]
            expand_index += [prefix_at, suffix_at]
            gather_index.append(bounds[-1] + P + suffix_at - used)
            used += len(suffix_at)
            bounds.append(bounds[-1] + P + len(suffix_at))
    # 3. Padding, in short documents of its own.
    padding = np.zeros(size - used, np.int64)
    expand_index.append(np.arange(used, size))
    gather_index.append(bounds[-1] + expand_index[-1] - used)
    bounds += [*range(bounds[-1] + PAD_DOC_LEN, bounds[-1] + len(padding), PAD_DOC_LEN), bounds[-1] + len(padding)]
    parts = {"input_ids": [*ids, padding], "position_ids": [*positions, padding], "logits_indices": logits_indices,
             "attention_mask": [np.ones(used, np.int64), padding], "targets": targets,
             "expand_index": expand_index, "gather_index": gather_index}
    batch = {name: torch.from_numpy(np.concatenate([padding[:0], *arrays])) for name, arrays in parts.items()}
    row = {name: batch[name][None] for name in ("input_ids", "position_ids", "attention_mask")}
    return batch | row | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


def collate_pairs(groups: list[tuple[Sequence[int], list[Sequence[int]]]], masks: list[np.ndarray],
                  size: int) -> dict[str, torch.Tensor]:
    """Prompts with their answers → the batch of `pack_shared_prefix`, of which only targets are kept.

    `masks`: of each of the D answers, which tokens are targets. Of each target [M], `document`: the answer that it
    belongs to, `token_at`: its own flat position. `ends` [D]: the flat position of the last token of each answer.
    """
    batch = pack_shared_prefix(groups, size)
    lengths = np.array([len(mask) for mask in masks], np.int64)
    last, predicted_at = torch.from_numpy(np.cumsum(lengths) - 1), batch["logits_indices"]
    token_at = torch.cat((predicted_at[1:], predicted_at[-1:]))  # a token's position predicts the next token
    token_at[last] = predicted_at[last]  # the last token has no position, since it predicts nothing
    batch |= {"token_at": token_at, "document": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))}
    is_target = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *masks]) != 0)
    batch |= {name: batch[name][is_target] for name in ("logits_indices", "targets", "document", "token_at")}
    return batch | {"ends": predicted_at[last]}
