"""What a larger vocabulary buys and costs: bytes per token of real text, and the share of the embedding."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from model.model_minimind import MiniMindConfig

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/vocabulary.json"
PUBLISHED = {"here": 6_400, "Llama 2": 32_000, "GPT-2": 50_257, "Llama 3": 128_256, "Qwen3": 151_669}
BLOCKS = 58_996_992  # parameters of the 64 M model beside the embedding


def draw() -> Figure:
    sizes = json.loads(RESULTS.read_text("utf-8"))["sizes"]
    entries = [size["vocab_size"] for size in sizes]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4))
    for language in ("chinese", "english"):
        left.plot(entries, [size[language]["bytes_per_token"] for size in sizes], "o-", label=language.title())
    left.set(xscale="log", xlabel="vocabulary", ylabel="bytes per token", title="shorter texts …")
    left.legend()
    hidden = MiniMindConfig().hidden_size
    vocabulary = np.geomspace(400, 200_000, 100)
    right.plot(vocabulary, 100 * vocabulary * hidden / (vocabulary * hidden + BLOCKS), color="#e76f51")
    for name, size in PUBLISHED.items():
        share = 100 * size * hidden / (size * hidden + BLOCKS)
        right.plot(size, share, "o", color="#e76f51")
        right.text(size * 0.8, share + 1, name, ha="right", fontsize=9)
    right.set(xscale="log", xlabel="vocabulary", ylabel="% of parameters", ylim=(0, 75),
              title=f"… and a larger embedding ({hidden} wide)")
    for axis, ticks in ((left, (400, 1600, 6400, 25600)), (right, (1000, 10000, 100000))):
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    return figure
