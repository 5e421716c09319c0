"""What a row length costs: the share of useful positions, padded and packed, and of tokens that are cut off."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from dataset.packing import best_fit
from dataset.sample_world import World
from model.chat import ChatTokenizer


def draw() -> Figure:
    tokenizer = ChatTokenizer()
    lengths = np.array([len(tokenizer.encode(row["conversations"])[0]) - 1 for row in World(0).rows("sft", 1000)])
    sizes = np.arange(64, 1025, 32)
    padded, packed, cut = [], [], []
    for size in sizes:
        kept = np.minimum(lengths, size)
        padded.append(kept.mean() / size)
        packed.append(kept.sum() / ((best_fit(kept, int(size)).max() + 1) * size))
        cut.append(1 - kept.sum() / lengths.sum())
    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot(sizes, np.array(packed) * 100, label="useful, packed")
    axes.plot(sizes, np.array(padded) * 100, label="useful, padded")
    axes.plot(sizes, np.array(cut) * 100, "--", label="tokens cut off")
    axes.set(xlabel="max_seq_len", ylabel="%", ylim=(0, 103))
    axes.legend(loc="center right")
    return figure
