"""What attention may see in a packed row: with the plain causal mask, and with a mask of the documents."""

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from model.attention import document_mask

LENGTHS = (9, 5, 7)  # three documents, then padding
ROW = 24


def draw() -> Figure:
    bounds = torch.tensor([0, *torch.tensor([*LENGTHS, ROW - sum(LENGTHS)]).cumsum(0)], dtype=torch.int32)
    documents = document_mask(bounds, 1, ROW)[0, 0]
    causal = torch.ones(ROW, ROW, dtype=torch.bool).tril()
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.3))
    for panel, mask, title in ((axes[0], causal, "causal only"), (axes[1], documents, "documents")):
        shade = mask.int() + (mask & ~documents).int()  # 0 hidden, 1 own document, 2 a stranger's
        panel.imshow(shade, cmap=ListedColormap(["#80889120", "#2a9d8f", "#e76f51"]), vmin=0, vmax=2)
        panel.set(title=title, xlabel="key", ylabel="query", xticks=[], yticks=[])
        for bound in bounds[1:-1]:
            panel.axhline(bound - 0.5, color="#808891", lw=0.8)
            panel.axvline(bound - 0.5, color="#808891", lw=0.8)
    return figure
