"""The loss of fine-tuning on real conversations, 8.3 M parameters on two cores, from the log of the run."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOG = Path(__file__).parent / "data/cpu_full_sft_256.jsonl"


def draw() -> Figure:
    rows = [json.loads(line) for line in LOG.read_text("utf-8").splitlines()]
    trained, tested = ([row for row in rows if name in row] for name in ("loss", "val_loss"))
    figure, axes = plt.subplots()
    axes.plot([row["tokens"] / 1e6 for row in trained], [row["loss"] for row in trained], label="training rows")
    axes.plot([row["tokens"] / 1e6 for row in tested], [row["val_loss"] for row in tested], "o-", color="C1", ms=5,
              label="held-out rows")
    axes.set(xlabel="tokens read (million)", ylabel="loss (nats per learned token)", ylim=(1.5, 5))
    axes.legend()
    return figure
