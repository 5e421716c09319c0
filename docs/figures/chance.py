"""Why chance is strong: what guessing scores on n questions, and what a small model scored."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# docs/results.md: name, questions, accuracy per character (acc_norm), chance
MEASURED = (("CMMLU", 5025, 0.259, 0.25), ("ARC Easy", 2376, 0.264, 0.25), ("PIQA", 1838, 0.490, 0.50),
            ("OpenBookQA", 500, 0.238, 0.25))


def draw() -> Figure:
    """Left: the range that holds 95% of all guessers. Right: accuracy minus chance, with two standard errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.1))
    n = np.geomspace(10, 10_000, 200)
    for chance in (0.5, 0.25):
        spread = 1.96 * np.sqrt(chance * (1 - chance) / n)
        left.fill_between(n, chance - spread, chance + spread, alpha=0.4, linewidth=0,
                          label=f"{1 / chance:.0f} options")
    left.set(xscale="log", xlabel="questions", ylabel="accuracy", ylim=(0, 0.85), title="95% of guessers score here")
    left.legend()
    for row, (_, questions, accuracy, chance) in enumerate(MEASURED):
        error = 2 * np.sqrt(accuracy * (1 - accuracy) / questions)
        right.errorbar(accuracy - chance, row, xerr=error, fmt="o", color="C0", capsize=3)
    right.axvline(0, color="#808891", linewidth=1)
    right.set(yticks=range(len(MEASURED)), yticklabels=[f"{name}, {n:,}" for name, n, *_ in MEASURED],
              xlim=(-0.06, 0.06), ylim=(len(MEASURED) - 0.5, -0.5), xlabel="accuracy − chance",
              title="a model that never saw real text")
    return figure
