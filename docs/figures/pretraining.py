"""The loss of two pretraining runs, AdamW and Muon, from the logs of the commands in chapter 5."""

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOGS = Path(__file__).parent / "data"


def draw() -> Figure:
    figure, axes = plt.subplots()
    for color, name, label in (("C0", "pretrain_adamw", "AdamW 2e-3"), ("C1", "pretrain_muon", "Muon 4e-3")):
        rows = [json.loads(line) for line in (LOGS / f"{name}_128.jsonl").read_text("utf-8").splitlines()]
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=color, label=label)
        tested = [row for row in rows if "val_loss" in row]
        axes.plot([row["step"] for row in tested], [row["val_loss"] for row in tested], "o", color=color, ms=5)
    axes.axhline(math.log(6400), ls=":", lw=1.5, color="C2", label="ln 6400: guessing")
    axes.plot([], [], "o", color="grey", ms=5, label="held-out rows")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 9.2))
    axes.legend()
    return figure
