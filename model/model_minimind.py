"""The decoder: RMSNorm, rotary positions with YaRN, grouped-query attention with QK-norm, SwiGLU, mixture of experts.

Parameter names are those of Qwen3 and Qwen3-MoE, so the weights open in any program that reads these.
Math only: no files, no flags.
Shapes: B rows, T tokens a row, S keys, H hidden, N = B*T tokens, K experts a token, E experts.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


class MiniMindConfig(PretrainedConfig):
    """Sizes and constants. The defaults are the published dense model (63.91 M); `use_moe=True` gives 198.42 M.

    Raises ValueError when the sizes do not fit each other.
    """

    model_type = "minimind"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 8,
        use_moe: bool = False,
        vocab_size: int = 6400,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        inference_rope_scaling: bool = False,
        num_experts: int = 4,
        num_experts_per_tok: int = 1,
        moe_intermediate_size: int | None = None,
        norm_topk_prob: bool = False,
        router_aux_loss_coef: float = 5e-4,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        pad_token_id: int = 0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        **kwargs,
    ):
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of {num_attention_heads} attention heads")
        if num_attention_heads % num_key_value_heads:
            raise ValueError(f"{num_attention_heads} query heads cannot share {num_key_value_heads} key-value heads")
        if num_experts_per_tok > num_experts:
            raise ValueError(f"num_experts_per_tok {num_experts_per_tok} is more than num_experts {num_experts}")
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.use_moe = bool(use_moe)
        self.vocab_size = vocab_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, rotary positions rotate pairs")
        self.intermediate_size = intermediate_size or math.ceil(hidden_size * math.pi / 64) * 64
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.inference_rope_scaling = bool(inference_rope_scaling)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        # False by measurement: docs/experiments.md, "Router weight". Published weights were trained with True.
        self.norm_topk_prob = norm_topk_prob
        self.router_aux_loss_coef = router_aux_loss_coef
        self.initializer_range = initializer_range
        kwargs.setdefault("architectures", ["MiniMindForCausalLM"])
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
                         tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32).to(x.dtype)


def few_sizes(rows: int, step: int = 16) -> int:
    """So many rows or some more: a power of two or a multiple of `step`. A CPU's products of other sizes are slower."""
    return 1 << (rows - 1).bit_length() if rows < step else -(-rows // step) * step


LARGEST_FEW = 128  # rows; above it an fp32 product takes as long with the weight on either side


def product(x: Tensor, weight: Tensor, packed: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ → [..., out]. `packed` is the weight in oneDNN's order.

    A CPU takes the left operand as it lies in memory and the right one rearranged. F.linear has the weight on the
    right, and rearranging it costs more than a few tokens' product itself; so inference puts it on the left. A single
    fp32 token only waits for the weight to be read: cut into pieces, it is read by all cores at once.
    """
    half, rows = x.dtype == torch.bfloat16, x.flatten(0, -2)
    M = len(rows)
    if packed is not None and (packed.dtype == torch.bfloat16 or M > 2):
        padded = F.pad(rows.to(packed.dtype), (0, 0, 0, few_sizes(M, 16 if M < LARGEST_FEW else 32) - M))
        return torch.ops.mkldnn._linear_pointwise(padded, packed, None, "none", [], "")[:M].unflatten(0, x.shape[:-1])
    # under no_grad alone all is as in training, to the bit; a compiler can only be asked for that
    training = torch.is_grad_enabled() if torch.compiler.is_compiling() else not torch.is_inference_mode_enabled()
    if x.device.type != "cpu" or x.dtype != weight.dtype or training or M > LARGEST_FEW and not half:
        return F.linear(x, weight)
    if M == 1 and not half:
        pieces = math.gcd(len(weight), 64)
        return (weight.unflatten(0, (pieces, -1)) @ rows.T.expand(pieces, -1, -1)).view(*x.shape[:-1], -1)
    # who compiles sends few sizes: rounding them here would make a graph of each
    wanted = M if torch.compiler.is_compiling() else few_sizes(M, 32 if half else 16)
    padded = F.pad(rows, (0, 0, 0, wanted - M)) if wanted > M else rows
    right = rows.expand(2, -1) if M == 1 else padded.contiguous()  # else 5 times as slow
    return (weight @ right.T).T[:M].unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """y = x · weightᵀ, no bias."""

    packed: Tensor | None = None

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.packed)


YARN_FACTOR, YARN_ORIGINAL_LENGTH, YARN_BETA_FAST, YARN_BETA_SLOW = 16.0, 2048, 32.0, 1.0


def rope_frequencies(config: MiniMindConfig, device: torch.device | None = None) -> Tensor:
    """Rotation per position of each pair of head dimensions, in radians: [head_dim / 2] fp32.

    θ^(-2i/d) (RoFormer, Su et al. 2021). With `inference_rope_scaling`, YaRN "NTK-by-parts" (Peng et al. 2023,
    eq. 19-23): pairs that turn more than beta_fast times within the original length keep their frequency, pairs that
    turn less than beta_slow times are slowed by the factor, those between are blended linearly. Attention factor 1.
    """
    dim, base = config.head_dim, config.rope_theta
    frequency = 1 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if not config.inference_rope_scaling:
        return frequency

    def pair_turning(turns: float) -> float:  # index of the pair that turns so often within the original length
        return dim * math.log(YARN_ORIGINAL_LENGTH / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_turning(YARN_BETA_FAST)), 0)
    high = min(math.ceil(pair_turning(YARN_BETA_SLOW)), dim - 1)
    pair = torch.arange(dim // 2, device=device, dtype=torch.float32)
    slowed = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - slowed) + frequency / YARN_FACTOR * slowed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [B, T, heads, D] by the angles of `cos`, `sin` [B, T, 1, D/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def attention_mask_4d(attention_mask: Tensor, queries: int) -> Tensor:
    """Which keys each query sees, [B, 1, queries, S] bool, from `attention_mask` [B, S]: 0 is padding, 1 a token.

    The queries are the last of the S positions. Padding sees only padding, so no row is empty and none is NaN.
    """
    keys = attention_mask.shape[1]
    position = torch.arange(keys, device=attention_mask.device)
    causal = position[None, :] <= position[keys - queries:, None]
    alike = attention_mask[:, None, :] == attention_mask[:, keys - queries:, None]
    return (alike & causal)[:, None]


def document_mask(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    """The same for packed rows: [rows, 1, length, length] bool, each token sees its own document up to itself."""
    index = torch.arange(rows * length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, index, right=True).view(rows, length)
    same = document[:, :, None] == document[:, None, :]
    return (same & same.new_ones(length, length).tril())[:, None]


def round_up(x: Tensor, step: int = 32) -> Tensor:
    """Append zeros to `x` [N, ...] on a CPU, so that N, if above `step`, becomes a multiple of it.

    A CPU builds a bf16 kernel for every N it meets, which takes 10 to 20 ms and 5 to 8 MB that are never given back:
    docs/experiments.md, "kernels". On GPUs nothing changes.
    """
    if x.device.type != "cpu" or len(x) <= step:
        return x
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, -len(x) % step))


def _flash_by_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Variable-length flash attention: one CUDA kernel over all documents of all rows, no mask in memory."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, heads, D = q.shape
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options = {"enable_gqa": True}
    else:  # torch 2.11
        options, share = {}, heads // k.shape[2]
        k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    flat = (x.reshape(B * T, -1, D) for x in (q, k, v))
    return varlen_attn(*flat, cu_seqlens, cu_seqlens, T, T, window_size=(-1, 0), **options).view(B, T, heads, D)


@torch.compiler.disable  # the documents' lengths change every step
def _loop_by_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same on a CPU: one fused causal attention a document. A mask would cost the whole T×T square."""
    lengths = [n for n in cu_seqlens.diff().tolist() if n]
    attended = []
    for piece in zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True):
        padded = (round_up(x).transpose(0, 1)[None] for x in piece)  # after the last token: causality hides it
        out = F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True)
        attended.append(out[0, :, :len(piece[0])])
    return torch.cat(attended, dim=1).transpose(0, 1).reshape(q.shape)


@torch.compiler.disable  # as many sizes as there are batches
def _attend_apart(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, spread: Tensor, fold: Tensor) -> Tensor:
    """The same where documents share their first tokens, which only here stand as often as they are shared."""
    apart = [x.flatten(0, 1).index_select(0, spread)[None] for x in (q, k, v)]
    fused = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    out = (_flash_by_document if fused else _loop_by_document)(*apart, cu_seqlens)
    return out[0].index_select(0, fold).view(q.shape)


def _attend_after_beginning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alike: int) -> Tensor:
    """One query a row, q [B, kv_heads, G, D], k, v [B, kv_heads, S, D], the first `alike` keys the same in all rows.

    Those are read once, by the queries of all rows in one product (Hydragen, Juravsky et al. 2024); a row's scores of
    them and of its own keys go through one softmax, so nothing is left to merge.
    """
    B, scaled, own = len(q), q / math.sqrt(q.shape[-1]), slice(alike, None)

    def together(x: Tensor) -> Tensor:  # [B, kv_heads, G, …] → [kv_heads, B·G, …]
        return x.transpose(0, 1).flatten(1, 2)

    def apart(x: Tensor) -> Tensor:
        return x.unflatten(1, (B, -1)).transpose(0, 1)

    of_own = (k[:, :, own] @ scaled.mT).mT.masked_fill(~mask[..., own], -math.inf)
    p = torch.cat((apart(together(scaled) @ k[0, :, :alike].mT), of_own), -1).softmax(-1)
    return apart(together(p[..., :alike]) @ v[0, :, :alike]) + p[..., own] @ v[:, :, own]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
           spread: Tensor | None = None, fold: Tensor | None = None, alike: int = 0) -> Tensor:
    """softmax(q·kᵀ/√D)·v with shared key-value heads: q [B, T, heads, D], k, v [B, S, kv_heads, D] → as q.

    `mask` [B, 1, T, S] bool says which keys a query sees. `cu_seqlens` [documents + 1] int32 bounds the documents
    of packed rows in the flattened [B*T]; repeated bounds are empty documents. With neither: plain causal, T = S.
    With `spread` and `fold` (`dataset.packing.pack_shared_prefix`) several documents share their first tokens.
    With T = 1, all rows may see the first `alike` keys, which are then the same in each of them.
    """
    if spread is not None:
        return _attend_apart(q, k, v, cu_seqlens, spread, fold)
    if cu_seqlens is not None and mask is None:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return _flash_by_document(q, k, v, cu_seqlens)
        if q.device.type == "cpu":
            return _loop_by_document(q, k, v, cu_seqlens)
        mask = document_mask(cu_seqlens, *q.shape[:2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[2] == 1:  # the heads that share keys become so many queries: the keys are read once
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        out = _attend_after_beginning(q, k, v, mask, alike) if alike else \
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.flatten(1, 2)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with RMSNorm on each query and key head (Qwen3)."""

    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        self.layer_index, self.head_dim = layer_index, config.head_dim
        query_size, key_size = (heads * config.head_dim for heads in (config.num_attention_heads,
                                                                       config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, key_size)
        self.v_proj = Linear(config.hidden_size, key_size)
        self.o_proj = Linear(query_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
                cache, spread: Tensor | None, fold: Tensor | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_index)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        alike = getattr(cache, "alike", 0)
        return self.o_proj(attend(q, k, v, mask, cu_seqlens, spread, fold, alike).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """E SwiGLU networks as stacked weights: every expert has its slice of one gradient, used or not, on every rank."""

    packed: dict[str, list[Tensor]] = {}

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        E, H, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, width))

    def forward(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Each token through its K experts, weighted and summed. Tokens are sorted by expert, nothing is dropped."""
        order = expert_NK.flatten().argsort(stable=True)
        load = F.one_hot(expert_NK.flatten(), len(self.gate_up_proj)).sum(0)
        gate, up = self.project("gate_up_proj", x_ND[order // expert_NK.shape[1]], load).chunk(2, dim=-1)
        sorted_y = self.project("down_proj", F.silu(gate) * up, load)
        y_NKD = sorted_y[order.argsort()].unflatten(0, expert_NK.shape)
        return (y_NKD * weight_NK[..., None].to(y_NKD.dtype)).sum(1)

    def project(self, name: str, x: Tensor, load: Tensor) -> Tensor:
        """Tokens [N, in], sorted by expert, times the weight `name` of their experts. → [N, out]"""
        return expert_product(x, getattr(self, name), load, self.packed.get(name))


def expert_product(x: Tensor, weight: Tensor, load: Tensor, packed: list[Tensor] | None = None) -> Tensor:
    """x [N, in] · weight [E, out, in]ᵀ → [N, out], where the first load[0] rows belong to expert 0, and so on."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if experts_in_one_kernel(kind, dtype, *weight.shape[1:]):
        return _grouped_by_expert(x.to(dtype), weight.to(dtype), load)
    return _loop_by_expert(x.to(dtype), weight if packed else weight.to(dtype), load, packed)


def experts_in_one_kernel(device: str, dtype: torch.dtype, *widths: int) -> bool:
    """Whether one kernel takes all experts: CUDA's, for bf16, with rows of whole 16 bytes."""
    return device == "cuda" and dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _grouped_by_expert(x: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """All experts in one kernel that reads the group bounds on the device."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=load.cumsum(0).to(torch.int32))


@torch.compiler.disable  # the load changes every step
def _loop_by_expert(x: Tensor, weight: Tensor, load: Tensor, packed: list[Tensor] | None = None) -> Tensor:
    """One matrix product an expert. The load is read on the host: free on a CPU, one short wait elsewhere."""
    pieces = zip(x.split(load.tolist()), weight.unbind(), packed or [None] * len(weight), strict=True)
    return torch.cat([product(round_up(piece), *expert)[:len(piece)] for piece, *expert in pieces])


class MoEFeedForward(nn.Module):
    """Top-k routing to expert networks (Qwen3-MoE; Switch, Fedus et al. 2021, for k = 1)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)
        self._register_load_state_dict_pre_hook(stack_experts)

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, H] → the same shape, and [2, E]: the share of real tokens each expert gets, its mean probability.

        `real` [B, T] is 0 on padding. The share counts each of a token's K choices, so it sums to K.
        """
        x_ND = x.flatten(0, -2)
        probability_NE = self.gate(x_ND).softmax(-1, dtype=torch.float32)
        weight_NK, expert_NK = probability_NE.topk(self.top_k, dim=-1)
        if self.normalise:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        chosen_NE = torch.zeros_like(probability_NE).scatter(1, expert_NK, 1.0)
        share = torch.ones_like(chosen_NE[:, 0]) if real is None else real.reshape(-1).to(chosen_NE.dtype)
        share = share / share.sum().clamp(min=1)  # a row may be all padding
        balance = torch.stack((share @ chosen_NE, share @ probability_NE))
        return self.experts(x_ND, expert_NK, weight_NK).view_as(x).to(x.dtype), balance


def stack_experts(state_dict: dict, prefix: str, *_) -> None:
    """Turn published per-expert names (`experts.3.up_proj.weight`) into stacked ones, in place."""
    parts = {name: [] for name in ("gate_proj", "up_proj", "down_proj")}
    while f"{prefix}experts.{len(parts['down_proj'])}.down_proj.weight" in state_dict:
        number = len(parts["down_proj"])
        for name, weights in parts.items():
            weights.append(state_dict.pop(f"{prefix}experts.{number}.{name}.weight"))
    if parts["down_proj"]:
        pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
        state_dict[f"{prefix}experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        state_dict[f"{prefix}experts.down_proj"] = torch.stack(parts["down_proj"])


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        self.use_moe = config.use_moe
        self.self_attn = Attention(config, layer_index)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None, cu_seqlens=None, cache=None,
                real: Tensor | None = None, spread=None, fold=None) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cu_seqlens, cache, spread, fold)
        normed = self.post_attention_layernorm(x)
        if not self.use_moe:
            return x + self.mlp(normed), None
        y, balance = self.mlp(normed, real)
        return x + y, balance


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        """As transformers does it, from folders with the experts stacked or with per-expert names."""
        name_experts()
        return super().from_pretrained(*arguments, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks and last norm: token ids to hidden states."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values=None, cu_seqlens: Tensor | None = None, spread: Tensor | None = None,
                fold: Tensor | None = None, **_) -> tuple[Tensor, Tensor | None]:
        """[B, T] → hidden states [B, T, H] and, for MoE, the load-balancing loss (not yet times its coefficient).

        `attention_mask`: [B, S] with 0 on padding, or a ready [B, 1, T, S] bool. `cu_seqlens`, `spread`, `fold`: see
        `attend`; then `attention_mask` only says which tokens are real. `past_key_values`: anything with transformers'
        `update`.
        """
        T = input_ids.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None and position_ids is None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)[None]
        angle = position_ids[..., None, None].float() * rope_frequencies(self.config, input_ids.device)
        cos, sin = angle.cos(), angle.sin()

        real = attention_mask[:, -T:] if attention_mask is not None and attention_mask.dim() == 2 else None
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask
        elif cu_seqlens is not None:
            mask = None
        elif attention_mask is not None:
            mask = attention_mask_4d(attention_mask, T)
        elif past_key_values is not None:
            keys = past_key_values.get_seq_length() + T
            mask = attention_mask_4d(torch.ones_like(input_ids[:, :1]).expand(-1, keys), T)
        else:
            mask = None

        x, balances = self.embed_tokens(input_ids), []
        for layer in self.layers:
            x, balance = layer(x, cos, sin, mask, cu_seqlens, past_key_values, real, spread, fold)
            balances.append(balance)
        return self.norm(x), self.balancing_loss(balances) if self.config.use_moe else None

    def balancing_loss(self, balances: list[Tensor]) -> Tensor:
        """E · Σ_e share_e · probability_e over the tokens of all layers (Switch eq. 4-6, as Qwen3-MoE computes it)."""
        share, probability = torch.stack(balances).mean(0)
        return self.config.num_experts * (share * probability).sum()


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The decoder with its output head (tied to the embedding), as transformers expects a causal language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig | None = None):
        super().__init__(config or MiniMindConfig())
        self.model = MiniMindModel(self.config)
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values=None, labels: Tensor | None = None, use_cache: bool = False,
                logits_to_keep: int | Tensor = 0, logits_at: Tensor | None = None,
                **packed) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, V], or of the last `logits_to_keep` of each row, or [M, V] at the flat indices `logits_at` [M].

        `labels` [B, T] (-100 ignored) are the input ids; the shift happens here, and `loss` is the mean next-token
        loss plus the load-balancing loss times its coefficient. The other arguments: `MiniMindModel.forward`.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden, aux_loss = self.model(input_ids, attention_mask, position_ids, past_key_values, **packed)
        if logits_at is not None:
            logits = self.lm_head(round_up(hidden.flatten(0, 1)[logits_at]))[:len(logits_at)]
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=past_key_values)


def name_experts() -> None:
    """Tell transformers, whose loader does not call load_state_dict, of per-expert names: they are Qwen3-MoE's."""
    from transformers import conversion_mapping

    names = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    conversion_mapping.register_checkpoint_conversion_mapping("minimind", names, overwrite=True)


def register() -> None:
    """Let transformers' AutoConfig and AutoModelForCausalLM open MiniMind folders."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)
