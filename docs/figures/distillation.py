"""Held-out loss of the students of chapter 8, three seeds each, as its commands printed it."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOSSES = {"308 answers": (1.5352, 1.5136, 1.5746), "+ teacher, α ½": (1.4464, 1.4145, 1.5029),
          "+ teacher, α 0": (1.3613, 1.3655, 1.4882), "α ½, T = 2": (1.4513, 1.4992, 1.5075),
          "α ½, T = 4": (1.3858, 1.3930, 1.4031), "α ½, reverse KL": (1.5596, 1.5778, 1.5691),
          "2,048 written\nby the teacher": (1.1858, 1.2428, 1.2408), "2,050 true\nanswers": (1.1945, 1.2013, 1.2158)}


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
