"""Draw the loss of training runs over their steps, or the reward of online RL, from their logs: PNG, SVG or PDF.

Logs of one stage with several seeds, named like grpo_s1_128.jsonl and grpo_s2_128.jsonl, share a panel.

    python scripts/draw_curves.py out/logs/pretrain_256.jsonl out/logs/full_sft_256.jsonl --out out/curves.png
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.cli import Parser, UserError, run_main

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")


def read_log(path: Path) -> list[dict]:
    """The rows of a log. Raises UserError when it is none."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a training log: {error}") from None


def subplots(*args, **kwargs):
    """matplotlib's, drawn to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*args, **kwargs)


def draw_curves(logs: list[Path], target: Path) -> None:
    """Loss, or reward where there is one, in training and validation; one panel per stage, one colour per seed."""
    panels: dict[str, list[Path]] = defaultdict(list)
    for log in logs:
        panels[re.sub(r"_s\d+(?=_|$)", "", log.stem)].append(log)
    figure, axes = subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (stage, seeds) in zip(axes[0], panels.items(), strict=True):
        for number, rows in enumerate(map(read_log, seeds)):
            name = "reward" if any("reward" in row for row in rows) else "loss"
            for key, style in ((name, "-"), (f"val_{name}", "o--")):
                if points := [(row["step"], row[key]) for row in rows if key in row]:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=None if number else key)
        axis.set(title=stage, xlabel="step", ylabel=name)
        axis.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="logs of training runs (jsonl)")
    parser.add_argument("--out", type=Path, required=True, help="image file to write (.png, .svg or .pdf)")
    args = parser.parse_args()
    if args.out.suffix.lower() not in IMAGE_SUFFIXES:
        parser.error(f"--out {args.out}: the file name must end in {', '.join(IMAGE_SUFFIXES)}")
    draw_curves(args.logs, args.out)


if __name__ == "__main__":
    run_main(main)
