"""The loss of the demo's fine-tuning, from the log of `make demo`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOG = Path(__file__).parent / "data/full_sft_128.jsonl"


def draw() -> Figure:
    rows = [json.loads(line) for line in LOG.read_text("utf-8").splitlines()]
    figure, axes = plt.subplots()
    axes.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], label="training rows")
    axes.plot(rows[-1]["tokens"] / 1e6, rows[-1]["val_loss"], "o", color="C1", label="held-out rows")
    axes.set(xlabel="tokens read (million)", ylabel="loss (nats per learned token)", yscale="log")
    axes.legend()
    return figure
