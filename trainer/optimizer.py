"""AdamW, or Muon for the hidden matrices, and the learning-rate schedule."""

import math

import torch
from torch import nn


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to a tenth of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """`adamw`: one fused AdamW (Loshchilov & Hutter 2019), decay on matrices only.

    `muon`: Muon (Jordan et al. 2024) for the 2-D matrices of the blocks, its update scaled to AdamW's size so that one
    learning rate serves both (Liu et al. 2025); AdamW for embeddings, norms and stacked experts.
    """
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    hidden = {key for key, p in trained.items() if name == "muon" and p.dim() == 2 and ".layers." in key}
    groups = [
        {"params": [p for key, p in trained.items() if key not in hidden and p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    device = next(iter(trained.values())).device.type
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr, betas=(0.9, 0.95), eps=1e-8,
                                    fused=device in ("cuda", "cpu"))]
    if hidden:
        optimizers.append(torch.optim.Muon([trained[key] for key in sorted(hidden)], lr, weight_decay=weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers
