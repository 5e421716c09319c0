"""Mixture-of-experts: many SwiGLU networks computed together, the load-balancing loss, and the published weight names.

Shapes: N tokens, K experts per token, E experts, H hidden. A suffix names them: `expert_NK` is [N, K].
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import PREPACKED, linear, pad_to_multiple

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # of `Experts`
MAX_DENSE_TOKENS = 256  # on a GPU: up to so many go to all experts, whose weights take longer to read than to multiply


class TokenGroups:
    """How many tokens each expert has: `sizes` [E] on the device, `counts` on the host."""

    def __init__(self, sizes: Tensor):
        self.sizes = sizes

    @cached_property
    def counts(self) -> list[int]:
        """Read once for all products of a layer: free on a CPU, a wait for the device elsewhere."""
        return self.sizes.tolist()


class Experts(nn.Module):
    """E SwiGLU networks as stacked weights: every expert has its slice of one gradient, used or not, on every rank."""

    path: str | None = None  # set by model.inference.prepacked: where PREPACKED has the weights, by name

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, device: str | None = None):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, device=device))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, device=device))

    def forward(self, x_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Σ_k weight_k · expert_k(x) → [N, H]. Tokens are sorted by expert; none is dropped."""
        N, E = len(x_NH), len(self.gate_up_proj)
        if use_dense_experts(x_NH):
            y_ENH = self.swiglu(x_NH.expand(E, -1, -1), None)
            y_NKH = y_ENH[expert_NK, torch.arange(N, device=x_NH.device)[:, None]]
        else:
            order = expert_NK.flatten().argsort(stable=True)
            groups = TokenGroups(F.one_hot(expert_NK.flatten(), E).sum(0))
            y_sorted = self.swiglu(x_NH[order // expert_NK.shape[1]], groups)
            y_NKH = y_sorted[order.argsort()].unflatten(0, expert_NK.shape)
        return (y_NKH * weight_NK[..., None].to(y_NKH.dtype)).sum(1)

    def swiglu(self, x: Tensor, groups: TokenGroups | None) -> Tensor:
        """down(silu(gate(x)) · up(x)) of tokens grouped as in `grouped_linear`."""
        gate, up = self.project("gate_up_proj", x, groups).chunk(2, dim=-1)
        return self.project("down_proj", F.silu(gate) * up, groups)

    def project(self, name: str, x: Tensor, groups: TokenGroups | None) -> Tensor:
        """Tokens, grouped as in `grouped_linear`, times the weight `name` of their experts."""
        prepacked = {} if torch.compiler.is_compiling() else PREPACKED.by_path.get(self.path, {})
        return grouped_linear(x, getattr(self, name), groups, prepacked.get(name))


def grouped_linear(x: Tensor, weight: Tensor, groups: TokenGroups | None,
                   prepacked: list[Tensor] | Tensor | None = None) -> Tensor:
    """Tokens x [N, in], sorted into `groups` by expert, times weight [E, out, in]ᵀ of their expert → [N, out].

    Without groups each expert has tokens of its own: x [E, N, in] → [E, N, out].
    """
    dtype = matmul_dtype(x)
    x = x.to(dtype)
    if isinstance(prepacked, Tensor):  # on a GPU: the weight in half precision
        weight, prepacked = prepacked, None
    if groups is not None and not can_use_grouped_mm(x.device.type, dtype, *weight.shape[1:]):
        return _linear_per_expert(x, weight if prepacked else weight.to(dtype), groups, prepacked)
    weight = weight.to(dtype)
    return x @ weight.mT if groups is None else _grouped_mm(x, weight, groups.sizes)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `x` is multiplied: autocast's, where that is enabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def use_dense_experts(x_NH: Tensor) -> bool:
    """Whether all experts take all tokens: few of them on a GPU, where sorting them takes longer than the products.

    Nothing then waits for the host, so a decoding step can be captured in a CUDA graph.
    """
    return x_NH.device.type != "cpu" and len(x_NH) <= MAX_DENSE_TOKENS


def can_use_grouped_mm(device: str, dtype: torch.dtype, *widths: int) -> bool:
    """Whether one kernel computes all experts: CUDA, bf16, and rows that are multiples of 16 bytes."""
    return device == "cuda" and dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths) and \
        has_grouped_mm()


@torch.compiler.assume_constant_result
def has_grouped_mm() -> bool:
    """Whether PyTorch has that kernel for the current CUDA device; on others it loops over the experts and waits."""
    return torch.cuda.get_device_capability()[0] in (9, 10)


def _grouped_mm(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """All experts in one kernel, which reads the bounds of the groups on the device."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=tokens_per_expert.cumsum(0).to(torch.int32))


@torch.compiler.disable  # the sizes change every step
def _linear_per_expert(x: Tensor, weight: Tensor, groups: TokenGroups, prepacked: list[Tensor] | None = None) -> Tensor:
    """One product per expert."""
    parts = zip(x.split(groups.counts), weight.unbind(), prepacked or [None] * len(weight), strict=True)
    return torch.cat([linear(pad_to_multiple(tokens), *matrices)[:len(tokens)] for tokens, *matrices in parts])


def router_stats(prob_NE: Tensor, expert_NK: Tensor, token_mask: Tensor | None) -> Tensor:
    """[2, E]: the fraction of real tokens that chose each expert, and its mean probability over them.

    `token_mask` [B, T] is 0 on padding. All K choices of a token count, so the fractions sum to K.
    """
    chosen_NE = torch.zeros_like(prob_NE).scatter(1, expert_NK, 1.0)
    token_weight = torch.ones_like(chosen_NE[:, 0]) if token_mask is None else token_mask.reshape(-1).to(prob_NE.dtype)
    token_weight = token_weight / token_weight.sum().clamp(min=1)  # a row may be all padding
    return torch.stack((token_weight @ chosen_NE, token_weight @ prob_NE))


def load_balancing_loss(stats: list[Tensor]) -> Tensor:
    """E · Σ_e fraction_e · probability_e, means over the layers (Switch, Fedus et al. 2021, eq. 4-6; Qwen3-MoE).

    `stats`: the `router_stats` [2, E] of each layer. At perfect balance the loss is K.
    """
    fraction, probability = torch.stack(stats).mean(0)
    return len(fraction) * (fraction * probability).sum()


def stack_expert_weights(state_dict: dict, prefix: str, *_) -> None:
    """Turn published per-expert names (`experts.3.up_proj.weight`) into the stacked ones of `Experts`, in place."""
    matrices = {name: [] for name in ("gate_proj", "up_proj", "down_proj")}
    while f"{prefix}experts.{len(matrices['down_proj'])}.down_proj.weight" in state_dict:
        expert = len(matrices["down_proj"])
        for name, weights in matrices.items():
            weights.append(state_dict.pop(f"{prefix}experts.{expert}.{name}.weight"))
    if matrices["down_proj"]:
        pairs = zip(matrices["gate_proj"], matrices["up_proj"], strict=True)
        state_dict[f"{prefix}experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        state_dict[f"{prefix}experts.down_proj"] = torch.stack(matrices["down_proj"])


def register_expert_names() -> None:
    """Teach transformers' loader, which does not call load_state_dict, the per-expert names: they are Qwen3-MoE's."""
    from transformers import conversion_mapping

    names = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    conversion_mapping.register_checkpoint_conversion_mapping("minimind", names, overwrite=True)
