"""Perplexity of the same tokens with ever more text before them, with and without YaRN: the demo and real models."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]


def plot(axis: Axes, lengths: list[int], curves: dict[str, list[float]], color: str, label: str) -> None:
    for scaling, dashes in (("plain", ()), ("yarn", (3, 2))):
        axis.plot(lengths, curves[scaling], color=color, dashes=dashes, marker=".",
                  label=label if scaling == "plain" else None)


def draw() -> Figure:
    """Left: the demo's model as it is, and after 59 steps on long texts. Right: two models on a novel."""
    sample = json.loads((ROOT / "benchmarks/results/long_context_sample.json").read_text("utf-8"))
    reports = (json.loads((ROOT / f"docs/report/{name}.json").read_text("utf-8")) for name in ("cpu", "zero"))
    small, novel = (report["stages"]["evaluation"]["context"] for report in reports)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3))
    plot(left, sample["lengths"], sample["pretrain"], "C0", "short texts")
    plot(left, sample["lengths"], sample["long"], "C1", "then long texts")
    left.set(title="demo", ylabel="perplexity of the last tokens")
    plot(right, small["lengths"], small, "C3", "8.3 M, rows of 512")
    plot(right, novel["lengths"], novel, "C2", "64 M, rows of 340 and 768")
    right.set(title="a novel")
    for axis, lengths, values in ((left, sample["lengths"], (2, 4, 8, 16, 32)),
                                  (right, novel["lengths"], (100, 300, 1000, 3000))):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xlabel="tokens of the window", xticks=lengths, xticklabels=lengths, yticks=values, yticklabels=values)
        axis.minorticks_off()
        axis.legend(fontsize=9, title="dashed: YaRN", title_fontsize=9)
    return figure
