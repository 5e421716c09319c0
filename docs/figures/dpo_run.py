"""Two DPO runs on the sample world, a sensible learning rate and one that is 33 times as high, from their logs."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOGS = Path(__file__).parent / "data"


def draw() -> Figure:
    runs = {name: [json.loads(line) for line in (LOGS / f"{name}_128.jsonl").read_text("utf-8").splitlines()]
            for name in ("dpo", "dpo_hot")}
    start = runs["dpo"][0]  # the validation before training, the same for both
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
    rows = runs["dpo"]
    trained, tested = ([row for row in rows if name in row] for name in ("margin", "val_margin"))
    left.plot([row["step"] for row in trained], [row["margin"] for row in trained], alpha=0.5, label="training pairs")
    left.plot([row["step"] for row in tested], [row["val_margin"] for row in tested], "o-", color="C1",
              label="held-out pairs")
    left.set(xlabel="step", ylabel="β · margin", title="3e-5")
    left.legend()
    for name, style, label in (("dpo", "-", "3e-5"), ("dpo_hot", "--", "1e-3")):
        tested = [start] + [row for row in runs[name] if row["step"] and "val_margin" in row]
        for side, color in (("chosen", "C0"), ("rejected", "C1")):
            change = [row[f"val_{side}_logp"] - start[f"val_{side}_logp"] for row in tested]
            right.plot([row["step"] for row in tested], change, f"o{style}", color=color, ms=4,
                       label=f"{side}, {label}")
    right.set(xlabel="step", ylabel="log p, change (nats)", title="held-out answers")
    right.legend(fontsize=9)
    return figure
