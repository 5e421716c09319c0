"""The way through the book: what each stage makes of the model, with its chapters."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

TEAL, ORANGE, VIOLET, GREY = "#2a9d8f", "#e76f51", "#8a7bd1", "#808891"
BOXES = {  # (column, row): title, chapters, colour
    (0, 1): ("text", "1, 4", GREY), (1, 1): ("random weights", "2, 3", GREY), (2, 1): ("continues texts", "5", TEAL),
    (3, 1): ("answers", "6", ORANGE), (4, 2): ("prefers", "9", VIOLET), (4, 1): ("learns by trying", "10", VIOLET),
    (4, 0): ("uses tools", "11", VIOLET), (3, 2): ("adapters, students", "7, 8", ORANGE),
    (5, 1): ("served", "12–15", GREY)}
ARROWS = (((0, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 1), (3, 1)), ((3, 1), (4, 1)), ((3, 1), (4, 2)), ((3, 1), (4, 0)),
          ((3, 1), (3, 2)), ((4, 1), (5, 1)), ((4, 0), (5, 1)), ((4, 2), (5, 1)))


def draw() -> Figure:
    figure, axis = plt.subplots(figsize=(10, 3.1))
    for (column, row), (title, chapters, colour) in BOXES.items():
        axis.add_patch(plt.Rectangle((column - 0.38, row - 0.3), 0.76, 0.6, fill=False, ec=colour, lw=1.8))
        axis.text(column, row + 0.08, title.replace(" ", "\n", 1) if len(title) > 9 else title, ha="center",
                  va="center", fontsize=9)
        axis.text(column, row - 0.21, chapters, ha="center", va="center", fontsize=8, color=colour)
    for (x, y), (to_x, to_y) in ARROWS:
        start, end = ((x, y + 0.31), (x, to_y - 0.31)) if x == to_x else ((x + 0.39, y), (to_x - 0.39, to_y))
        axis.annotate("", xytext=start, xy=end, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.3})
    axis.set(xlim=(-0.45, 5.45), ylim=(-0.4, 2.4))
    axis.axis("off")
    return figure
