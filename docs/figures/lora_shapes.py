"""A weight of the 64 M model, the two matrices of its adapter at rank 16, drawn to scale, and what each rank costs."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from model.model_lora import LoRAConfig, apply_lora, lora_state
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM


def adapter_share(rank: int) -> float:
    """Parameters of the adapters of the 64 M model, of all layers, as a share of its own."""
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig())
    total = sum(p.numel() for p in model.parameters())
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    apply_lora(model, LoRAConfig(rank=rank, targets=targets))
    return sum(p.numel() for p in lora_state(model).values()) / total


def draw() -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3), width_ratios=(1.5, 1))
    size, rank = 768, 16
    for x, width, height, text, color in ((0, size, size, "W, frozen\n768 × 768", "#808891"),
                                          (size + 190, rank, size, "B\n768 × 16", "C1"),
                                          (size + 330, size, rank, "A\n16 × 768", "C1")):
        y = (size - height) / 2
        left.add_patch(Rectangle((x, y), width, height, color=color, alpha=0.35 if x == 0 else 1, lw=0))
        left.text(x + width / 2, size / 2 if x == 0 else y + height + 25, text, ha="center",
                  va="center" if x == 0 else "bottom")
    left.text(size + 85, size / 2, "+", ha="center", va="center", fontsize=18)
    left.text(size + 268, size / 2, "·", ha="center", va="center", fontsize=18)
    left.set(xlim=(-20, 2 * size + 360), ylim=(-20, size + 150), aspect="equal")
    left.axis("off")
    ranks = 2 ** np.arange(8)
    right.plot(ranks, [100 * adapter_share(int(rank)) for rank in ranks], "o-")
    right.set(xlabel="rank", ylabel="trained, % of the model", xscale="log", yscale="log")
    right.set_xticks(ranks, ranks)
    right.minorticks_off()
    return figure
