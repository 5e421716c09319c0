"""Bits per byte over training time, the published recipe and ours, three seeds each, from benchmarks/results."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "benchmarks/results/quality_recipes_180s.json"


def draw() -> Figure:
    figure, axes = plt.subplots(figsize=(6, 3.4))
    results = json.loads(RESULTS.read_text("utf-8"))
    for number, recipe in enumerate(("published", "ours")):
        for seed, run in enumerate(results[recipe]):
            _, seconds, bits = zip(*run["curve"], strict=True)
            axes.plot(seconds, bits, "o-", ms=3, color=f"C{number}", label=None if seed else recipe)
    axes.set(xlabel="seconds of training on two cores", ylabel="bits per byte")
    axes.legend()
    return figure
