"""Held-out loss of the new identity by the rank of the adapter, from the logs of the commands in chapter 7."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOGS = Path(__file__).parent / "data"


def val_loss(name: str) -> float:
    return json.loads((LOGS / f"{name}_128.jsonl").read_text("utf-8").splitlines()[-1])["val_loss"]


def draw() -> Figure:
    figure, axes = plt.subplots(figsize=(7, 3))
    ranks = {1: "lora_r1", 2: "lora_r2", 4: "lora_r4", 16: "lora_identity", 64: "lora_r64"}
    axes.plot(list(ranks), [val_loss(name) for name in ranks.values()], "o-", label="all seven matrices of a block")
    axes.plot(4, val_loss("lora_qv4"), "s", color="C1", label="q_proj and v_proj only")
    axes.axhline(val_loss("full_identity"), ls="--", lw=1.5, color="C2", label="all weights, no adapter")
    axes.set(xlabel="rank", ylabel="held-out loss", xscale="log", yscale="log")
    axes.set_xticks(list(ranks), list(ranks))
    axes.minorticks_off()
    axes.legend(loc="center right")
    return figure
