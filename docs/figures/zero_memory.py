"""What a rank holds of the training state: by strategy on 8 ranks, and of a 7 B model by the number of ranks."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.dry_run import STATE, meta_model, num_parameters

GREY = "#808891"
LARGE = {"hidden_size": 4096, "num_hidden_layers": 35, "num_attention_heads": 32, "num_key_value_heads": 8}


def draw() -> Figure:
    """Left: weights, gradients and moments of our 64 M model on 8 ranks. Right: 7 B on 1 to 64 ranks."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3))
    small, large = num_parameters(meta_model()), num_parameters(meta_model(**LARGE))
    bottom = np.zeros(len(STATE))
    parts = np.array([state(small, 8) for state in STATE.values()]).T / 1e9
    for name, part in zip(("weights", "gradients", "moments"), parts, strict=True):
        left.bar(list(STATE), part, bottom=bottom, label=name, width=0.7)
        bottom += part
    for column, total in enumerate(bottom):
        left.text(column, total + 0.015, f"{total:.2f}", ha="center")
    left.set(ylabel="GB per rank", ylim=(0, 1.2), title=f"{small / 1e6:.0f} M parameters, 8 ranks")
    left.legend()
    ranks = 2 ** np.arange(7)
    for name, state in STATE.items():
        right.plot(ranks, [sum(state(large, N)) / 1e9 for N in ranks], label=name)
        right.text(70, sum(state(large, 64)) / 1e9, name, va={"zero3": "bottom", "fsdp": "top"}.get(name, "center"))
    right.axhline(80, color=GREY, linewidth=1, linestyle="--")
    right.text(14, 83, "80 GB", color=GREY)
    right.set(xscale="log", yscale="log", xlabel="ranks", ylabel="GB per rank", xticks=ranks, xticklabels=ranks,
              yticks=(2, 5, 10, 20, 50, 100), yticklabels=(2, 5, 10, 20, 50, 100), xlim=(0.9, 110),
              title=f"{large / 1e9:.0f} B parameters")
    right.minorticks_off()
    return figure
