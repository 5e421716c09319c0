"""Held-out loss of the students of chapter 8, three seeds each, as its commands printed it."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOSSES = {"202 answers": (1.8569, 1.9377, 1.9043), "+ teacher, α ½": (1.7369, 1.8432, 1.8197),
          "+ teacher, α 0": (1.6634, 1.7917, 1.7340), "α ½, T = 2": (1.8081, 1.8414, 1.8544),
          "α ½, T = 4": (1.7202, 1.7284, 1.7516), "α ½, reverse KL": (1.9296, 1.9217, 1.9357),
          "1,346 written\nby the teacher": (1.5176, 1.5812, 1.5959), "1,350 true\nanswers": (1.4949, 1.5026, 1.5477)}


def draw() -> Figure:
    figure, axes = plt.subplots(figsize=(7, 3.8))
    colors = ["C4", *["C0"] * 5, "C1", "C4"]
    for y, (losses, color) in enumerate(zip(LOSSES.values(), colors, strict=True)):
        axes.plot(losses, [-y] * 3, "o", color=color, alpha=0.7)
        axes.plot(sum(losses) / 3, -y, "|", color=color, ms=20, mew=2)
    axes.set_yticks([-y for y in range(len(LOSSES))], list(LOSSES))
    axes.set_xlabel("held-out loss")
    axes.grid(axis="x", alpha=0.3)
    return figure
