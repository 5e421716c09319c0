"""What 4 bits do to 32 weights that share a scale, and what a file costs: megabytes and bits per byte."""

import json

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from model.weights import ROOT
from scripts.convert_model import round_to

GREY = "#808891"


def draw() -> Figure:
    """Left: one block of random weights, and the levels that q4_0 has for them. Right: gguf_quality.json."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3), width_ratios=(3, 2))
    weights = 0.05 * torch.randn(1, 32, generator=torch.Generator().manual_seed(7))
    step = (weights.abs().max() / 8).item()
    for number in range(-8, 8):
        left.axhline(number * step, color=GREY, linewidth=0.5, alpha=0.5)
    left.plot(weights[0], "o", markersize=6, label="weight")
    left.plot(round_to("q4_0", "", weights, "gguf")[0], "_", markersize=10, markeredgewidth=2, label="q4_0")
    left.set(xlabel="a block of 32 weights", xticks=(), ylim=(-0.11, 0.14), title="4 bits: 16 levels for all 32")
    left.legend(loc="upper right", ncols=2, handletextpad=0.2)
    results = json.loads((ROOT / "benchmarks/results/gguf_quality.json").read_text("utf-8"))
    bits = [result["bits_per_byte"] for result in results.values() if "bits_per_byte" in result]
    for name, result in results.items():
        if name in ("f32", "f16", "q8_0", "q4_0"):
            right.plot(result["megabytes"], result["bits_per_byte"], "o", color="C0")
            right.annotate(name, (result["megabytes"], result["bits_per_byte"]), xytext=(5, 6),
                           textcoords="offset points")
    right.set(xlabel="MB of the file", ylabel="bits per byte", xlim=(0, 8), ylim=(min(bits) - 1e-3, max(bits) + 1.5e-3),
              title="demo's model, held-out text")
    return figure
