"""What is trained against what it costs elsewhere: the table on the demo's base of docs/experiments.md."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

TABLE = Path(__file__).parents[1] / "experiments.md"
BEFORE = ("before", 13.0, 83.0, 100.0)  # the sentence above the table
RUNS = ("GRPO, 2e-4", "CISPO, 2e-4", "PPO, 2e-4", "PPO, 1e-4")


def read_rows() -> list[tuple[str, float, float, float]]:
    rows = {}
    pattern = r"\| ((?:GRPO|CISPO|PPO), \de-4) \| ([\d.]+)% \| \*{0,2}(\d+)%\*{0,2} \| (\d+)% \|"
    for line in TABLE.read_text("utf-8").splitlines():
        if match := re.fullmatch(pattern, line):
            rows[match[1]] = (match[1], *map(float, match.groups()[1:]))
    return [BEFORE, *(rows[name] for name in RUNS)]


def draw() -> Figure:
    figure, axes = plt.subplots(figsize=(7, 3))
    names, *columns = zip(*read_rows(), strict=True)
    for number, (label, values) in enumerate(zip(("what is trained: counting letters", "other held-out answers",
                                                  "its own name"), columns, strict=True)):
        axes.bar([i + 0.26 * (number - 1) for i in range(len(names))], values, 0.24, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="right answers, %", ylim=(0, 128), yticks=range(0, 101, 20))
    axes.legend(ncols=3, loc="upper center", fontsize=9)
    return figure
