"""Scaled dot-product attention for every layout of a batch: padded, packed, shared prompts, cached decoding.

One name, `attention`, chooses the kernel. Shapes: B rows, T queries, S keys per row, D head dimension; N = B·T.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import pad_to_multiple


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
              expand_index: Tensor | None = None, gather_index: Tensor | None = None,
              shared_prefix_len: int = 0) -> Tensor:
    """softmax(q·kᵀ/√D)·v with shared key-value heads: q [B, T, heads, D], k, v [B, S, kv_heads, D] → as q.

    `mask` [B, 1, T, S] bool says which keys a query sees. `cu_seqlens` [documents + 1] int32 bounds the documents
    of packed rows in the flattened [B*T]; repeated bounds are empty documents. With neither: plain causal, T = S.
    With `expand_index` and `gather_index` (`dataset.packing.branched`) several documents share their first tokens.
    With T = 1, all rows may see the first `shared_prefix_len` keys, which are then the same in each of them.
    """
    if expand_index is not None:
        return _shared_prefix_varlen(q, k, v, cu_seqlens, expand_index, gather_index)
    if cu_seqlens is not None and mask is None:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return _varlen_flash(q, k, v, cu_seqlens)
        if q.device.type == "cpu":
            return _sdpa_per_document(q, k, v, cu_seqlens)
        mask = document_mask(cu_seqlens, *q.shape[:2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[2] == 1:  # the heads that share keys become so many queries: the keys are read once
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        out = _decode_shared_prefix(q, k, v, mask, shared_prefix_len) if shared_prefix_len else \
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.flatten(1, 2)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def attention_mask_4d(attention_mask: Tensor, num_queries: int) -> Tensor:
    """Which keys each query sees, [B, 1, num_queries, S] bool, from `attention_mask` [B, S]: 0 is padding, 1 a token.

    The queries are the last of the S positions. Padding sees only padding, so no row is empty and none is NaN.
    """
    num_keys = attention_mask.shape[1]
    position = torch.arange(num_keys, device=attention_mask.device)
    causal = position[None, :] <= position[num_keys - num_queries:, None]
    same_kind = attention_mask[:, None, :] == attention_mask[:, num_keys - num_queries:, None]
    return (same_kind & causal)[:, None]


def document_mask(cu_seqlens: Tensor, num_rows: int, length: int) -> Tensor:
    """The same for packed rows, [num_rows, 1, length, length] bool: a token sees its own document up to itself."""
    index = torch.arange(num_rows * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, index, right=True).view(num_rows, length)
    same_document = document[:, :, None] == document[:, None, :]
    return (same_document & same_document.new_ones(length, length).tril())[:, None]


def _varlen_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Variable-length flash attention: one CUDA kernel over all documents of all rows, no mask in memory."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, heads, D = q.shape
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options = {"enable_gqa": True}
    else:  # torch 2.11
        options, group_size = {}, heads // k.shape[2]
        k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)
    flat = (x.reshape(B * T, -1, D) for x in (q, k, v))
    return varlen_attn(*flat, cu_seqlens, cu_seqlens, T, T, window_size=(-1, 0), **options).view(B, T, heads, D)


@torch.compiler.disable  # the documents' lengths change every step
def _sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same on a CPU: one fused causal attention per document. A mask would cost the whole T×T square."""
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    outputs = []
    for document in zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True):
        padded = (pad_to_multiple(x).transpose(0, 1)[None] for x in document)  # at the end: causality hides it
        out = F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True)
        outputs.append(out[0, :, :len(document[0])])
    return torch.cat(outputs, dim=1).transpose(0, 1).reshape(q.shape)


@torch.compiler.disable  # as many sizes as there are batches
def _shared_prefix_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, expand_index: Tensor,
                          gather_index: Tensor) -> Tensor:
    """The same where documents share a prefix, which is repeated for each of them here and nowhere else."""
    expanded = [x.flatten(0, 1).index_select(0, expand_index)[None] for x in (q, k, v)]
    has_flash = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    out = (_varlen_flash if has_flash else _sdpa_per_document)(*expanded, cu_seqlens)
    return out[0].index_select(0, gather_index).view(q.shape)


def _decode_shared_prefix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix_len: int) -> Tensor:
    """One query per row and head, q [B, kv_heads, G, D], k, v [B, kv_heads, S, D] → as q.

    The first `prefix_len` keys are the same in all rows: the queries of all rows read them once, in one product
    (Hydragen, Juravsky et al. 2024). A row's scores of the prefix and of its own keys go through one softmax, so
    nothing is left to merge.
    """
    B, scaled, suffix = len(q), q / math.sqrt(q.shape[-1]), slice(prefix_len, None)

    def fold_batch(x: Tensor) -> Tensor:  # [B, kv_heads, G, …] → [kv_heads, B·G, …]
        return x.transpose(0, 1).flatten(1, 2)

    def unfold_batch(x: Tensor) -> Tensor:
        return x.unflatten(1, (B, -1)).transpose(0, 1)

    prefix_scores = unfold_batch(fold_batch(scaled) @ k[0, :, :prefix_len].mT)
    suffix_scores = (k[:, :, suffix] @ scaled.mT).mT.masked_fill(~mask[..., suffix], -math.inf)
    p = torch.cat((prefix_scores, suffix_scores), -1).softmax(-1)
    return unfold_batch(fold_batch(p[..., :prefix_len]) @ v[0, :, :prefix_len]) + p[..., suffix] @ v[:, :, suffix]
