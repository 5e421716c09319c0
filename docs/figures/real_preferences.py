"""Held-out pairs, three of four real, that DPO and the reward model of 8.3 M parameters get right, from their logs."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOGS = Path(__file__).parent / "data"


def draw() -> Figure:
    figure, axes = plt.subplots()
    for name, label in (("dpo", "DPO"), ("reward", "reward model")):
        rows = [json.loads(line) for line in (LOGS / f"cpu_{name}_256.jsonl").read_text("utf-8").splitlines()]
        tested = [row for row in rows if "val_accuracy" in row]
        axes.plot([row["step"] for row in tested], [100 * row["val_accuracy"] for row in tested], "o-", ms=5,
                  label=label)
    axes.axhline(50, ls=":", lw=1.5, color="C2", label="guessing")
    axes.set(xlabel="step", ylabel="held-out pairs right, %", ylim=(45, 80))
    axes.legend()
    return figure
