"""Scaled dot-product attention for every layout of a batch: padded, packed, shared prompts, cached decoding.

`BatchLayout` says what the layout is, `attention` chooses the kernel for it.
Shapes: B rows, T queries per row, S keys per row, D head dimension.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import pad_to_multiple


class BatchLayout(NamedTuple):
    """Which keys each token of a batch sees, and which tokens are real: one object for all layers of a forward pass.

    By default each row is one causal sequence. `mask` is for padded rows and for decoding with a cache; `cu_seqlens` is
    for rows packed with documents (`dataset.packing.collate`). With the two indices as well, documents share a prefix
    that is in the row once (`dataset.prefix_sharing`): only attention repeats it, for each of them.
    """

    mask: Tensor | None = None  # [B, 1, T, S] bool: the keys that each query sees
    token_mask: Tensor | None = None  # [B, T]: 0 on padding, which the router does not count
    cu_seqlens: Tensor | None = None  # [documents + 1] int32: bounds in the flattened [B·T]; repeated: empty documents
    expand_index: Tensor | None = None  # [M]: for each of the documents' M tokens, its index in the flattened [B·T]
    gather_index: Tensor | None = None  # [B·T]: the other way, for each token of the rows its index in [M]
    cache: Any = None  # with transformers' `update(k, v, layer)`: k, v [B, kv_heads, T, D] → [B, kv_heads, S, D]
    shared_prefix_len: int = 0  # decoding (T = 1): the first keys that are the same in all rows, and visible to all


def causal_layout(input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> BatchLayout:
    """The layout of a batch as transformers describes it.

    `attention_mask`: [B, S] with 0 on padding, or [B, 1, T, S] bool. S counts the keys of the cache and the T new ones.
    """
    if attention_mask is None:
        if cache is None:
            return BatchLayout()
        num_keys = cache.get_seq_length() + input_ids.shape[1]
        attention_mask = torch.ones_like(input_ids[:, :1]).expand(-1, num_keys)
    if attention_mask.dim() == 4:
        return BatchLayout(attention_mask, cache=cache, shared_prefix_len=getattr(cache, "shared_prefix_len", 0))
    num_queries = input_ids.shape[1]
    return BatchLayout(padding_mask(attention_mask, num_queries), attention_mask[:, -num_queries:], cache=cache)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout) -> Tensor:
    """softmax(q·kᵀ/√D)·v with shared key-value heads: q [B, T, heads, D], k, v [B, S, kv_heads, D] → as q."""
    mask = layout.mask
    # 1. Packed documents, each on its own.
    if layout.cu_seqlens is not None:
        if q.device.type == "cpu" or _has_flash(q):
            return (_varlen if layout.expand_index is None else _shared_prefix_varlen)(q, k, v, layout)
        mask = document_mask(layout.cu_seqlens, *q.shape[:2], layout.expand_index, layout.gather_index)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # 2. Decoding. The heads that share keys become as many queries, so the keys are read once.
    if q.shape[2] == 1:
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        out = _decode_shared_prefix(q, k, v, mask, layout.shared_prefix_len) if layout.shared_prefix_len else \
            F.scaled_dot_product_attention(q, k, v, attn_mask=_mask_for_mps(q, mask))
        return out.flatten(1, 2)[:, None]
    # 3. Whole rows.
    if q.is_cuda and (mask is not None or not _has_flash(q)):
        return _memory_efficient(q, k, v, mask).transpose(1, 2)
    if q.device.type == "cpu":  # flash attention wants the numbers of a head side by side
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_mask_for_mps(q, mask), is_causal=mask is None,
                                         enable_gqa=True)
    return out.transpose(1, 2)


def padding_mask(attention_mask: Tensor, num_queries: int) -> Tensor:
    """Which keys each query sees, [B, 1, num_queries, S] bool, from `attention_mask` [B, S]: 0 is padding, 1 a token.

    The queries are the last of the S positions. Padding sees only padding: a query without keys would give NaN.
    """
    num_keys = attention_mask.shape[1]
    position = torch.arange(num_keys, device=attention_mask.device)
    causal = position[None, :] <= position[num_keys - num_queries:, None]
    same_kind = attention_mask[:, None, :] == attention_mask[:, num_keys - num_queries:, None]
    return (same_kind & causal)[:, None]


def document_mask(cu_seqlens: Tensor, num_rows: int, length: int, expand_index: Tensor | None = None,
                  gather_index: Tensor | None = None) -> Tensor:
    """The same for packed rows, [num_rows, 1, length, length] bool: a token sees its own document up to itself.

    With the two indices of `BatchLayout`, what precedes a document in its row and belongs to it too is its prefix.
    """
    size = num_rows * length if expand_index is None else len(expand_index)
    index = torch.arange(size, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, index, right=True)
    if expand_index is None:
        document = document.view(num_rows, length)
        same_document = document[:, :, None] == document[:, None, :]
    else:
        belongs = cu_seqlens.new_zeros(len(cu_seqlens) + 1, num_rows * length, dtype=torch.bool)
        belongs = belongs.index_put((document, expand_index), belongs.new_ones(()))
        row = torch.arange(num_rows, device=cu_seqlens.device)[:, None]
        same_document = belongs.unflatten(1, (num_rows, length))[document[gather_index].view(num_rows, length), row]
    return (same_document & same_document.new_ones(length, length).tril())[:, None]


@torch.compiler.assume_constant_result
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's flash attention supports them: half precision, built in, Ampere or newer, heads up to 256."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and \
        torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _has_flash(q: Tensor) -> bool:
    return has_flash(q.device, q.dtype, q.shape[-1])


def _pad_heads(*tensors: Tensor) -> list[Tensor]:
    """Append zeros to half-precision heads whose size is no multiple of 8, which CUDA's fused kernels ask for."""
    padding = -tensors[0].shape[-1] % 8 if tensors[0].dtype != torch.float32 else 0
    return [F.pad(x, (0, padding)) if padding else x for x in tensors]


def _memory_efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, heads, T, D], k, v [B, kv_heads, S, D] → as q, where CUDA has no flash attention, or not with this mask.

    Its memory-efficient kernel does not share keys and values among heads: so each head gets its copy of them.
    """
    D, group_size = q.shape[-1], q.shape[1] // k.shape[1]
    q, k, v = _pad_heads(q, k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          scale=1 / math.sqrt(D))[..., :D]


def _mask_for_mps(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """MPS reads a shared mask wrongly where there are up to 8 queries: github.com/pytorch/pytorch/pull/184180."""
    if q.device.type != "mps" or mask is None or q.shape[2] > 8:
        return mask
    return mask.expand(*q.shape[:3], -1).contiguous()


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout) -> Tensor:
    return (_sdpa_per_document if q.device.type == "cpu" else _varlen_flash)(q, k, v, layout.cu_seqlens)


def _varlen_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Variable-length flash attention: one CUDA kernel over all documents of all rows, no mask in memory."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, heads, D = q.shape
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options = {"enable_gqa": True}
    else:  # torch 2.11
        options, group_size = {}, heads // k.shape[2]
        k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)
    flat = _pad_heads(*(x.reshape(B * T, -1, D) for x in (q, k, v)))
    out = varlen_attn(*flat, cu_seqlens, cu_seqlens, T, T, window_size=(-1, 0), scale=1 / math.sqrt(D), **options)
    return out[..., :D].view(B, T, heads, D)


@torch.compiler.disable  # the documents' lengths change every step
def _sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed documents on a CPU: one fused causal attention per document. A mask would compute all T×T scores."""
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    outputs = []
    for document in zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True):
        padded = (pad_to_multiple(x).transpose(0, 1)[None] for x in document)  # at the end: causality hides it
        out = F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True)
        outputs.append(out[0, :, :len(document[0])])
    return torch.cat(outputs, dim=1).transpose(0, 1).reshape(q.shape)


@torch.compiler.disable  # as many sizes as there are batches
def _shared_prefix_varlen(q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout) -> Tensor:
    """Packed documents that share a prefix: only here is it repeated for each of them."""
    expanded = [x.flatten(0, 1).index_select(0, layout.expand_index)[None] for x in (q, k, v)]
    out = _varlen(*expanded, layout)
    return out[0].index_select(0, layout.gather_index).view(q.shape)


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
