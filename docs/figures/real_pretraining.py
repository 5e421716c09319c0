"""Bits per byte of held-out real text over the tokens read, 8.3 M parameters on two cores, from the log of the run."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOG = Path(__file__).parent / "data/cpu_pretrain_256.jsonl"
# bits per byte of the same texts, those of out/cpu/data/pretrain_val.jsonl: 8 * len(bz2.compress(joined)) / len(joined)
BZIP2 = 2.88


def draw() -> Figure:
    rows = [json.loads(line) for line in LOG.read_text("utf-8").splitlines()]
    tested = [row for row in rows if "val_bpb" in row]
    figure, axes = plt.subplots()
    axes.plot([row["tokens"] / 1e6 for row in tested], [row["val_bpb"] for row in tested], "o-", ms=4)
    axes.axhline(BZIP2, ls=":", lw=1.5, color="C2")
    axes.annotate("bzip2", (0.99, BZIP2), (0, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", color="C2")
    axes.set(xlabel="tokens read (million)", ylabel="bits per byte, held-out text", ylim=(1.4, 4))
    return figure
