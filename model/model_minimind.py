"""The decoder: RMSNorm, rotary positions with YaRN, grouped-query attention with QK-norm, SwiGLU, mixture of experts.

Configuration and mathematics only: `linear`, `attention` and `moe`, beside this file, choose the kernels.
Parameter names are those of Qwen3 and Qwen3-MoE, so the weights open in any program that reads these.
Shapes: B rows, T tokens per row, H hidden size, D head dimension, V vocabulary; N = B·T tokens, K experts per token,
E experts. A suffix names them where there are many: `expert_NK` is [N, K].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .attention import BatchLayout, attention, causal_layout
from .linear import Linear, linears, pad_to_multiple
from .moe import Experts, load_balancing_loss, register_expert_names, router_stats, stack_expert_weights

YARN_FACTOR, YARN_ORIGINAL_LENGTH, YARN_BETA_FAST, YARN_BETA_SLOW = 16.0, 2048, 32.0, 1.0
IGNORED_KEYWORDS = ("return_dict", "use_cache", "cache_position")  # passed by transformers, without effect
CACHE_FIELD = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MiniMindConfig(PretrainedConfig):
    """Sizes of the decoder; the defaults are the published ones (dense 63.91 M, MoE 198.42 M parameters).

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
        qk_norm: bool = True,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        inference_rope_scaling: bool = False,
        num_experts: int = 4, num_experts_per_tok: int = 1, n_shared_experts: int = 0,
        moe_intermediate_size: int | None = None, norm_topk_prob: bool = False,
        router_aux_loss_coef: float = 5e-4, initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        pad_token_id: int = 0, bos_token_id: int = 1, eos_token_id: int = 2,
        **kwargs,
    ):
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of {num_attention_heads} attention heads")
        if num_attention_heads % num_key_value_heads:
            raise ValueError(f"{num_attention_heads} query heads cannot share {num_key_value_heads} key-value heads")
        if num_experts_per_tok > num_experts:
            raise ValueError(f"num_experts_per_tok {num_experts_per_tok} is more than num_experts {num_experts}")
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.use_moe, self.vocab_size = bool(use_moe), vocab_size
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, rotary positions rotate pairs")
        self.intermediate_size = intermediate_size or math.ceil(hidden_size * math.pi / 64) * 64
        self.max_position_embeddings, self.rope_theta = max_position_embeddings, rope_theta
        self.rms_norm_eps, self.qk_norm = rms_norm_eps, bool(qk_norm)
        self.inference_rope_scaling = bool(inference_rope_scaling)
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        # False by measurement: docs/experiments.md, "Router weight". Published weights were trained with True.
        self.norm_topk_prob, self.n_shared_experts = bool(norm_topk_prob), n_shared_experts
        self.router_aux_loss_coef, self.initializer_range = router_aux_loss_coef, initializer_range
        kwargs.setdefault("architectures", ["MiniMindForCausalLM"])
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
                         tie_word_embeddings=bool(tie_word_embeddings), **kwargs)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not torch.compiler.is_compiling():  # one kernel; uncompiled, the code below has eight
            dtype = torch.promote_types(x.dtype, self.weight.dtype)
            return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32).to(x.dtype)


def rope_frequencies(config: MiniMindConfig, device: torch.device | None = None) -> Tensor:
    """Rotation per position of each pair of head dimensions, in radians: [D/2] fp32.

    θ_i = base^(-2i/D) (RoFormer, Su et al. 2021). With `inference_rope_scaling`, YaRN's "NTK-by-parts" (Peng et al.
    2023, eq. 19-23): pairs that turn more than beta_fast times within the original length keep their frequency, those
    that turn less than beta_slow times are slowed by the factor, between them it is blended. Attention factor 1.
    """
    dim, base = config.head_dim, config.rope_theta
    frequency = 1 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if not config.inference_rope_scaling:
        return frequency

    def pair_with(num_turns: float) -> float:  # the index i of the pair that turns so often, θ_i solved for i
        return dim * math.log(YARN_ORIGINAL_LENGTH / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(YARN_BETA_FAST)), 0)
    high = min(math.ceil(pair_with(YARN_BETA_SLOW)), dim - 1)
    pair = torch.arange(dim // 2, device=device, dtype=torch.float32)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / YARN_FACTOR * ramp


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [B, T, heads, D] by the angles of `cos`, `sin` [B, T, 1, D/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with RMSNorm on each query and key head (Qwen3, not MiniMind2)."""

    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        self.layer_index, self.head_dim = layer_index, D
        self.q_proj = Linear(H, config.num_attention_heads * D)
        self.k_proj = Linear(H, config.num_key_value_heads * D)
        self.v_proj = Linear(H, config.num_key_value_heads * D)
        self.o_proj = Linear(config.num_attention_heads * D, H)
        self.q_norm, self.k_norm = (RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                                    for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: BatchLayout) -> Tensor:
        """x [B, T, H] → the same shape; q, k, v are [B, T, heads, D]."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in linears(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(self.q_norm(q), cos, sin), apply_rotary(self.k_norm(k), cos, sin)
        if layout.cache is not None:  # keys and values of the T new tokens → of all tokens so far
            k, v = layout.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_index)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return self.o_proj(attention(q, k, v, layout).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class MoEFeedForward(nn.Module):
    """Top-k routing to experts (Qwen3-MoE; for k = 1 Switch, Fedus et al. 2021) and shared experts (MiniMind2)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))
        self._register_load_state_dict_pre_hook(stack_expert_weights)

    def forward(self, x: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor | None]:
        """x [B, T, H] → the same shape, and the `router_stats` [2, E]; None with a cache (in inference)."""
        x_NH = x.flatten(0, -2)
        prob_NE = self.gate(x_NH).softmax(-1, dtype=torch.float32)
        weight_NK, expert_NK = prob_NE.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        y = self.experts(x_NH, expert_NK, weight_NK).view_as(x).to(x.dtype)
        for shared_expert in self.shared_experts:
            y = y + shared_expert(x)
        return y, router_stats(prob_NE, expert_NK, layout.token_mask) if layout.cache is None else None


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        self.use_moe = config.use_moe
        self.self_attn = Attention(config, layer_index)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: BatchLayout) -> tuple[Tensor, Tensor | None]:
        """x [B, T, H] → the same shape, and for MoE without a cache the `router_stats` [2, E]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        normed = self.post_attention_layernorm(x)
        if not self.use_moe:
            return x + self.mlp(normed), None
        y, stats = self.mlp(normed, layout)
        return x + y, stats


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        """From folders with the experts stacked, or with one name per expert as published."""
        register_expert_names()
        return super().from_pretrained(*arguments, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, Experts)):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=self.config.initializer_range)
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
                past_key_values=None, layout: BatchLayout | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """[B, T] → hidden states [B, T, H] and, for MoE without a cache, the load-balancing loss (not yet times its
        coefficient).

        `attention_mask` [B, S] or [B, 1, T, S] and `past_key_values`, a cache, are transformers' way to describe a
        batch (`causal_layout`); a `layout` replaces both. Raises TypeError for other keywords that ask for anything.
        """
        if unknown := [name for name, value in kwargs.items()
                       if value is not None and value is not False and name not in IGNORED_KEYWORDS]:
            raise TypeError(f"MiniMind's forward pass does not know {', '.join(unknown)}")
        if layout is None:
            layout = causal_layout(input_ids, attention_mask, past_key_values)
        if position_ids is None:
            start = layout.cache.get_seq_length() if layout.cache is not None else 0
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        angle = position_ids[..., None, None].float() * rope_frequencies(self.config, input_ids.device)
        cos, sin = angle.cos(), angle.sin()  # [B, T, 1, D/2]
        x, stats = self.embed_tokens(input_ids), []
        for layer in self.layers:
            x, layer_stats = layer(x, cos, sin, layout)
            stats.append(layer_stats)
        return self.norm(x), load_balancing_loss(stats) if self.config.use_moe and layout.cache is None else None


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
                logits_to_keep: int | Tensor = 0, logits_indices: Tensor | None = None, cache=None,
                num_items_in_batch: int | Tensor | None = None, **kwargs) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, V], or of the last `logits_to_keep` of each row, or [M, V] at the flat `logits_indices` [M].

        `labels` [B, T] (-100 ignored) are the input ids; the shift happens here. `loss` is the mean next-token loss, or
        its sum over transformers' `num_items_in_batch`, plus the load-balancing loss times its coefficient. `cache` is
        the newer name of `past_key_values`. The other arguments: `MiniMindModel.forward`.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden, aux_loss = self.model(input_ids, attention_mask, position_ids, cache, **kwargs)
        if logits_indices is not None:
            logits = self.lm_head(pad_to_multiple(hidden.flatten(0, 1)[logits_indices]))[:len(logits_indices)]
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0: all
            logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")  # -100 is ignored
            loss = loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **{CACHE_FIELD: cache})
