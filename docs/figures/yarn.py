"""What YaRN does to the frequencies of the rotary positions: fast pairs stay, slow pairs are slowed."""

import math

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from model.model_minimind import YARN_ORIGINAL_LENGTH, MiniMindConfig, rope_frequencies


def draw() -> Figure:
    """Left: turns of each pair within the original length. Right: what the frequency is multiplied by."""
    config = MiniMindConfig()
    plain = rope_frequencies(config)
    config.inference_rope_scaling = True
    yarn = rope_frequencies(config)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.1))
    for frequency, label in ((plain, "as trained"), (yarn, "with YaRN")):
        left.plot(frequency * YARN_ORIGINAL_LENGTH / (2 * math.pi), label=label)
    left.axhspan(1, 32, alpha=0.15, color="#808891", linewidth=0)
    left.set(yscale="log", xlabel="pair of a head", ylabel="turns", title=f"turns in {YARN_ORIGINAL_LENGTH:,} tokens")
    left.legend()
    right.plot(yarn / plain, color="C1")
    right.set(xlabel="pair of a head", ylim=(0, 1.05), title="frequency, YaRN / as trained")
    return figure
