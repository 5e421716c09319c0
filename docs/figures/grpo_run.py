"""Two GRPO runs that differ in the reward only: what is right, what is well-formed, and the KL to the start."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/grpo_sample.json"
PANELS = (("val_exact", "held out: right"), ("val_format", "held out: well-formed"), ("kl", "KL to the start, nats"))


def draw() -> Figure:
    runs = json.loads(RESULTS.read_text("utf-8"))["runs"]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8))
    for axis, (name, title) in zip(axes, PANELS, strict=True):
        for run, label in zip(runs, ("exact = 1", "exact = 1, format = 0.2"), strict=True):
            rows = [row for row in run["log"] if name in row]
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, marker=".")
        axis.set(xlabel="rollout", title=title, ylim=(-0.03, 1.03) if name != "kl" else None)
    axes[0].legend(fontsize=9)
    return figure
