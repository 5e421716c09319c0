"""Losses as pure functions. Each stage's `(model, batch) → Loss` and the equations below it."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", "cu_seqlens", "logits_at")


class Loss(NamedTuple):
    """What a micro-batch contributes: a sum, to be divided by the units of the whole step, and a mean."""

    total: Tensor  # summed over units (tokens, pairs, …); the loop divides by the units of all micro-batches and ranks
    mean: Tensor | None = None  # averaged over micro-batches and ranks: the load-balancing loss
    seen: dict[str, Tensor] = {}  # what else to log, summed over the same units


def balancing(model: nn.Module, aux_loss: Tensor | None) -> Tensor | None:
    """The load-balancing loss times its coefficient, None for a dense model."""
    config = getattr(model, "module", model).config
    return None if aux_loss is None else config.router_aux_loss_coef * aux_loss


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """Σ -log p(target) over the supervised tokens: logits [M, V] are computed only where there is a label."""
    output = model(**{name: batch[name] for name in MODEL_INPUTS})
    return Loss(F.cross_entropy(output.logits.float(), batch["targets"], reduction="sum"),
                balancing(model, output.aux_loss))
