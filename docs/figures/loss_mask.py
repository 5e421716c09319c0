"""The tokens of a chat, and which of them are learned: from the chat format itself."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from model.chat import ChatTokenizer

CHAT = [{"role": "user", "content": "Add 17, 2 and 5."},
        {"role": "assistant", "reasoning_content": "17 + 2 = 19\n19 + 5 = 24", "content": "The sum is 24."},
        {"role": "user", "content": "Thank you!"},
        {"role": "assistant", "content": "You are welcome."}]
WIDTH = 92  # characters per line


def draw() -> Figure:
    tokenizer = ChatTokenizer()
    ids, mask = tokenizer.encode(CHAT)
    figure, axes = plt.subplots(figsize=(9, 3))
    x, y = 0.0, 0
    for token, is_target in zip(ids, mask, strict=True):
        text = tokenizer.decode([token], keep_special_tokens=True).replace("\n", "↵").replace(" ", "·")
        width = len(text) + 1
        if x + width > WIDTH:
            x, y = 0.0, y - 1
        color, alpha = ("C1", 0.45) if is_target else ("#808891", 0.15)
        axes.add_patch(FancyBboxPatch((x + 0.3, y + 0.2), width - 0.6, 0.6, boxstyle="round,pad=0,rounding_size=0.1",
                                      mutation_aspect=0.12, facecolor=color, linewidth=0, alpha=alpha))
        axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=8, family="monospace")
        x += width
        if text.endswith("↵") and not is_target and len(text) == 1 and ids[0] != token:
            x, y = 0.0, y - 1
    axes.set(xlim=(0, WIDTH), ylim=(y - 0.1, 1.1))
    axes.axis("off")
    return figure
