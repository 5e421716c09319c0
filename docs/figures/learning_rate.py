"""The schedule of the learning rate: ours, and beside it warm-up, stable, decay (WSD)."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from trainer.optimizer import learning_rate

STEPS, WARMUP = 1000, 50


def wsd(step: int, decay: int = 200) -> float:
    """The share of the peak under WSD: constant after the warm-up, then linear to a tenth in the last `decay` steps."""
    return min((step + 1) / WARMUP, 1.0, 0.1 + 0.9 * (STEPS - 1 - step) / decay)


def draw() -> Figure:
    figure, axes = plt.subplots(figsize=(7, 2.8))
    axes.plot([learning_rate(step, STEPS, 1.0, WARMUP) for step in range(STEPS)], label="here: warm-up, cosine")
    axes.plot([wsd(step) for step in range(STEPS)], "--", lw=1.5, label="WSD")
    axes.set(xlabel="step", ylabel="share of the peak", ylim=(0, 1.05))
    axes.legend(loc="lower left", bbox_to_anchor=(0.08, 0.05))
    return figure
