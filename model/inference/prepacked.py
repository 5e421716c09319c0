"""Copies of the weights for the lifetime of an engine: on a CPU in oneDNN's blocked order, on a GPU in half precision.

oneDNN reorders the right operand of every product; with few tokens that takes longer than the product itself.
Reordered once, weights of 64 M take 0.1 s and as much memory again. Measured: docs/experiments.md, "packed".
On a GPU autocast would cast the fp32 weights of a policy in training at every step of a rollout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model import linear
from model.linear import Linear
from model.moe import EXPERT_WEIGHTS, Experts

# by path, of each Linear, of fused ones, and of each weight of Experts (on a CPU one by one)
Prepacked = dict[str, Tensor | dict[str, list[Tensor] | Tensor]]
FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers with the same input: one product
NUM_TOKENS = 16  # oneDNN chooses the order for this number; it is valid for any


def has_no_hooks(model: nn.Module) -> bool:
    """Whether no module has hooks, which may gather sharded weights around each call (FSDP)."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def prepack(model: nn.Module, dtype: torch.dtype) -> Prepacked:
    """Prepack the weights of every layer for products in `dtype`. Empty where this is not possible, or not needed."""
    device, mkldnn = model.device.type, torch.ops.mkldnn
    if not has_no_hooks(model):
        return {}
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
        return {}
    # 1. Layers with the same input, if none of them has an adapter.
    prepacked: Prepacked = {}
    fused: set[nn.Module] = set()
    for path, module in model.named_modules():
        for names in FUSED_LAYERS:
            layers = [getattr(module, name, None) for name in names]
            if not isinstance(layers[0], Linear):
                continue
            layers[0].fused_path = None
            if all(isinstance(layer, Linear) for layer in layers):
                layers[0].fused_path = f"{path}.{'+'.join(names)}"
                prepacked[layers[0].fused_path] = pack(torch.cat([layer.weight.detach() for layer in layers]))
                fused.update(layers)
    # 2. The others.
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module not in fused:
            prepacked[path], module.path = pack(module.weight), path
        elif isinstance(module, Experts):
            prepacked[path] = {name: pack_stack(getattr(module, name)) for name in EXPERT_WEIGHTS}
            module.path = path
    return prepacked


@contextmanager
def use_prepacked(prepacked: Prepacked) -> Iterator[None]:
    """Inside, the layers multiply by their prepacked weights; outside, by the parameters."""
    linear.PREPACKED.by_path, linear.compiles_prepacked = prepacked, bool(prepacked)
    try:
        yield
    finally:
        linear.PREPACKED.by_path, linear.compiles_prepacked = {}, False
