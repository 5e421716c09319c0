"""Rows of a fine-tuning batch, padded and packed: the conversations of the sample world, one colour each."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from dataset.packing import best_fit
from dataset.sample_world import World
from model.chat import ChatTokenizer

LENGTH, ROWS = 512, 12


def draw() -> Figure:
    tokenizer = ChatTokenizer()
    chats = [row["conversations"] for row in World(0).rows("sft", 500)]
    lengths = np.array([len(tokenizer.encode(chat)[0]) - 1 for chat in chats])
    lengths = lengths[lengths <= LENGTH]
    packed = best_fit(lengths, LENGTH)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for panel, row_of, title in ((axes[0], np.arange(len(lengths)), "padded"), (axes[1], packed, "packed")):
        rng = np.random.default_rng(0)
        shown = rng.choice(row_of.max() + 1, ROWS, replace=False)
        for y, row in enumerate(shown):
            panel.barh(y, LENGTH, color="#808891", alpha=0.15)
            start = 0
            for number, length in enumerate(lengths[row_of == row]):
                panel.barh(y, length, left=start, color=f"C{(number + y) % 6}", alpha=0.8, edgecolor="none")
                start += length
        useful = lengths.sum() / ((row_of.max() + 1) * LENGTH)
        panel.set(title=f"{title}: {row_of.max() + 1} rows, {useful:.0%} useful", xlabel="position", yticks=[])
        panel.spines["left"].set_visible(False)
    return figure
