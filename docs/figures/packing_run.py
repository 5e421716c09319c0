"""The validation loss of two fine-tuning runs, rows padded and packed, from the logs of the commands in chapter 4."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOGS = Path(__file__).parent / "data"
POSITIONS = 4 * 512  # of a step


def draw() -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.1), sharey=True)
    for name, label in (("sft_packed", "packed"), ("sft_padded", "padded")):
        rows = [json.loads(line) for line in (LOGS / f"{name}_128.jsonl").read_text("utf-8").splitlines()]
        losses = [row["val_loss"] for row in rows]
        left.plot([row["step"] * POSITIONS / 1000 for row in rows], losses, "o-", ms=4, label=label)
        right.plot([row["tokens"] / 1000 for row in rows], losses, "o-", ms=4)
    left.set(xlabel="positions computed (thousand)", ylabel="validation loss")
    right.set(xlabel="tokens read (thousand)")
    left.legend()
    return figure
