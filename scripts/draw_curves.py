"""Draw the loss of training runs over their steps, or the reward of online RL, from their logs, as a PNG.

    python scripts/draw_curves.py out/logs/pretrain_256.jsonl out/logs/full_sft_256.jsonl --out out/curves.png
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.errors import UserError, run_main
from trainer.arguments import Parser


def read_log(path: Path) -> list[dict]:
    """The rows of a log. Raises UserError when it is none."""
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a training log: {error}") from None


def draw_curves(logs: list[Path], target: Path) -> None:
    """Loss, or reward where there is one, in training and validation, one panel a log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(logs), figsize=(5 * len(logs), 3.5), squeeze=False)
    for axis, log in zip(axes[0], logs, strict=True):
        rows = read_log(log)
        name = "reward" if any("reward" in row for row in rows) else "loss"
        for key, style in ((name, "-"), (f"val_{name}", "o")):
            if points := [(row["step"], row[key]) for row in rows if key in row]:
                axis.plot(*zip(*points, strict=True), style, label=key)
        axis.set(title=log.stem, xlabel="step", ylabel=name)
        axis.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="logs of training runs (jsonl)")
    parser.add_argument("--out", type=Path, required=True, help="the picture (png)")
    args = parser.parse_args()
    draw_curves(args.logs, args.out)


if __name__ == "__main__":
    run_main(main)
