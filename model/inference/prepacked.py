"""Weights in the order in which a CPU multiplies by them: copies, for as long as an engine answers.

oneDNN rearranges the right operand of every product; of a few tokens that takes longer than the product itself.
Rearranged once, weights of 64 M take 0.1 s and as much memory again. Measured: docs/experiments.md, "packed".
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.linear import Linear
from model.moe import Experts

Prepacked = list[tuple[nn.Module, Tensor | dict[str, list[Tensor]]]]
ROWS = 16  # what the order is chosen for; it serves any number


def has_no_hooks(model: nn.Module) -> bool:
    """Whether the weights lie whole in the modules; else hooks bring them, around each call."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def prepack(model: nn.Module, dtype: torch.dtype) -> Prepacked:
    """Each layer with its weights prepacked, as products in `dtype` read them. Nothing where that is not possible."""
    mkldnn = torch.ops.mkldnn
    able = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
    if model.device.type != "cpu" or not able or not has_no_hooks(model):
        return []

    def reorder(weight: Tensor) -> Tensor:
        return mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS)

    prepacked: Prepacked = []
    for module in model.modules():
        if isinstance(module, Linear):
            prepacked.append((module, reorder(module.weight)))
        elif isinstance(module, Experts):
            prepacked.append((module, {name: [reorder(weight) for weight in getattr(module, name)]
                                    for name in ("gate_up_proj", "down_proj")}))
    return prepacked


@contextmanager
def use_prepacked(prepacked: Prepacked) -> Iterator[None]:
    """Inside, the layers multiply by their prepacked weights; outside by the weights as they are."""
    for module, weights in prepacked:
        module.prepacked = weights
    try:
        yield
    finally:
        for module, _ in prepacked:
            del module.prepacked
