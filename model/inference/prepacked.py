"""Copies of the weights for as long as an engine runs: on a CPU in oneDNN's blocked order, on a GPU in half precision.

oneDNN reorders the right operand of every product; with few tokens that takes longer than the product itself.
Reordered once, weights of 64 M take 0.1 s and as much memory again. Measured: docs/experiments.md, "packed".
On a GPU autocast would cast the fp32 weights of a policy in training at every step of a rollout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.linear import Linear
from model.moe import EXPERT_WEIGHTS, Experts

# of each Linear, and of each weight of Experts (on a CPU one by one)
Prepacked = list[tuple[nn.Module, Tensor | dict[str, list[Tensor] | Tensor]]]
NUM_TOKENS = 16  # the order is chosen for so many; it serves any number


def has_no_hooks(model: nn.Module) -> bool:
    """Whether the modules hold their whole weights; where hooks are, they may bring them around each call (FSDP)."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def prepack(model: nn.Module, dtype: torch.dtype) -> Prepacked:
    """Prepack the weights of every layer for products in `dtype`. Empty where this is not possible, or not needed."""
    device, mkldnn = model.device.type, torch.ops.mkldnn
    if not has_no_hooks(model):
        return []
    if device == "cuda" and model.dtype != dtype:
        def pack(weight: Tensor) -> Tensor:
            return weight.detach().to(dtype)

        pack_stack = pack
    elif device == "cpu" and torch.backends.mkldnn.is_available() and (
            dtype == torch.float32 or dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()):
        def pack(weight: Tensor) -> Tensor:
            return mkldnn._reorder_linear_weight(weight.detach().to(dtype), NUM_TOKENS)

        def pack_stack(weights: Tensor) -> list[Tensor]:
            return [pack(weight) for weight in weights]
    else:
        return []
    prepacked: Prepacked = []
    for module in model.modules():
        if isinstance(module, Linear):
            prepacked.append((module, pack(module.weight)))
        elif isinstance(module, Experts):
            prepacked.append((module, {name: pack_stack(getattr(module, name)) for name in EXPERT_WEIGHTS}))
    return prepacked


@contextmanager
def use_prepacked(prepacked: Prepacked) -> Iterator[None]:
    """Inside, the layers multiply by their prepacked weights; outside, by the parameters."""
    for module, weights in prepacked:
        module.prepacked = weights
    try:
        yield
    finally:
        for module, _ in prepacked:
            del module.prepacked
