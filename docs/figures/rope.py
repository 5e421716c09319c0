"""How rotary positions turn the pairs of a head, and what the turning does to attention scores."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from model.model_minimind import MiniMindConfig, apply_rotary, rope_frequencies


def draw() -> Figure:
    """Left: one key pair at positions 0 to 5. Right: the score of a query with itself, so many tokens away."""
    config = MiniMindConfig()
    frequency = rope_frequencies(config)  # [D/2]
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1, 2), figsize=(8, 3))
    for position in range(6):
        angle = position * frequency[3].item()
        left.annotate("", xytext=(0, 0), xy=(np.cos(angle), np.sin(angle)),
                      arrowprops={"arrowstyle": "-|>", "color": plt.cm.viridis(0.15 + position / 7), "lw": 2})
        left.text(1.15 * np.cos(angle), 1.15 * np.sin(angle), str(position), ha="center", va="center")
    left.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", title="pair 3 at positions 0–5")
    left.axis("off")
    distance = torch.arange(0, 400)
    angle = (distance[:, None].float() * frequency)[None, :, None]
    ones = torch.ones(1, len(distance), 1, config.head_dim)
    turned = apply_rotary(ones, angle.cos(), angle.sin())[0, :, 0]
    right.plot(distance, turned @ turned[0] / config.head_dim)
    right.set(xlabel="distance in tokens", ylabel="score", title="query · key, both the same before turning")
    return figure
