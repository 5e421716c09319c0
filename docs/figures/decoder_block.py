"""The decoder's block, dense and with a mixture of experts, with the sizes of the 64 M and 198 M models."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from model.model_minimind import MiniMindConfig

TEAL, ORANGE, VIOLET, GREY = "#2a9d8f", "#e76f51", "#8a7bd1", "#808891"


def box(axis, x: float, y: float, text: str, colour: str, width: float = 2.6, height: float = 0.56) -> None:
    axis.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, fill=False, ec=colour, lw=1.8))
    axis.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(axis, *points: tuple[float, float]) -> None:
    axis.plot(*zip(*points[:-1], strict=True), color=GREY, lw=1.4)
    axis.annotate("", xytext=points[-2], xy=points[-1], arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.4})


def trunk(axis, config: MiniMindConfig) -> None:
    """What both have: from ids to the second norm, and from the last sum to the logits."""
    box(axis, 0, 0, f"embedding {config.vocab_size:,} × {config.hidden_size}", GREY)
    box(axis, 0, 1.2, "RMSNorm", VIOLET)
    box(axis, 0, 2.1, f"attention: {config.num_attention_heads} query,\n{config.num_key_value_heads} key-value heads",
        TEAL, height=0.8)
    box(axis, 0, 3.5, "RMSNorm", VIOLET)
    for y in (2.85, 5.75):
        axis.text(0, y, "+", ha="center", va="center", fontsize=15)
        axis.add_patch(plt.Circle((0, y), 0.17, fill=False, ec=GREY))
    box(axis, 0, 6.6, "RMSNorm", VIOLET)
    box(axis, 0, 7.4, "head = embedding transposed", GREY)
    for start, end in ((0.28, 0.92), (1.48, 1.7), (2.5, 2.68), (3.02, 3.22), (5.92, 6.32), (6.88, 7.12)):
        arrow(axis, (0, start), (0, end))
    for start, end in ((0.6, 2.85), (3.1, 5.75)):  # residual connections
        arrow(axis, (0, start), (-1.7, start), (-1.7, end), (-0.17, end))
    axis.add_patch(plt.Rectangle((-2, 0.45), 4.3, 5.6, fill=False, ec=GREY, ls=":", lw=1.2))
    axis.text(2.25, 0.62, f"× {config.num_hidden_layers}", ha="right", fontsize=12)


def draw() -> Figure:
    figure, (dense, moe) = plt.subplots(1, 2, figsize=(8.6, 6.2))
    config = MiniMindConfig()
    for axis, title in ((dense, "dense, 63.9 M"), (moe, "mixture of experts, 198.4 M (63.9 M active)")):
        trunk(axis, config)
        axis.set(xlim=(-2.3, 2.5), ylim=(-0.5, 7.9), title=title)
        axis.axis("off")
    box(dense, 0, 4.65, f"SwiGLU\n{config.hidden_size} → {config.intermediate_size:,} → {config.hidden_size}", ORANGE,
        height=0.9)
    arrow(dense, (0, 3.78), (0, 4.2))
    arrow(dense, (0, 5.1), (0, 5.58))
    box(moe, 0, 4.2, "router: softmax, top 1", TEAL, width=2.4, height=0.45)
    arrow(moe, (0, 3.78), (0, 3.97))
    for expert in range(config.num_experts):
        x = -1.05 + 0.7 * expert
        box(moe, x, 4.95, f"{expert}", ORANGE, width=0.55, height=0.45)
        if expert == 2:
            arrow(moe, (x, 4.42), (x, 4.72))
            arrow(moe, (x, 5.18), (x, 5.4), (0, 5.4), (0, 5.58))
    moe.text(1.5, 4.95, "4 SwiGLU", va="center", fontsize=9, rotation=90)
    return figure
