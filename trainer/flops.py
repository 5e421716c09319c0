"""Model FLOPs utilisation: the operations per token, and how many per second this machine reaches."""

import math
import time

import torch
from torch import nn

from model.device import synchronise


def flops_per_token(model: nn.Module, length: float) -> float:
    """Floating-point operations per token in training, forward and backward (Chowdhery et al. 2022, appendix B).

    6 per weight that takes part in a product (4 if it is frozen; embedding look-ups count nothing, of the experts only
    the active ones), and causal attention over `length` positions: half of 12 · layers · heads · head_dim · length.
    """
    config, work = model.config, 0.0
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            work += 6 * config.num_attention_heads * config.head_dim * length
        if isinstance(module, nn.Embedding):
            continue
        for p in module.parameters(recurse=False):
            if p.dim() >= 2:
                share = config.num_experts_per_tok / config.num_experts if ".experts" in name else 1
                work += (6 if p.requires_grad else 4) * p.numel() * share
    return work


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What this machine reaches in a large matrix product, in FLOP/s: the measured 100% of MFU."""
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device)  # its own: measuring must not move the run's random numbers
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = math.inf
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
