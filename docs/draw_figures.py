"""Draw the figures of the book: docs/figures/<name>.py → docs/images/<name>.svg."""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, not this folder

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from model.cli import Parser, UserError, run_main

FIGURES = ROOT / "docs/figures"
GREY = "#808891"  # readable on white and on dark
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "figure", "figure.figsize": (7, 3.4),
         "figure.constrained_layout.use": True, "font.family": "sans-serif", "font.size": 11, "lines.linewidth": 2,
         "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "legend.frameon": False,
         "axes.prop_cycle": matplotlib.cycler(color=["#2a9d8f", "#e76f51", "#8a7bd1", "#d9a02b", "#4a90d9", "#c45c9c"]),
         **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)}


def draw(name: str, images: Path) -> Path:
    """Run `draw()` of a figure's file and save what it returns, the same bytes each time."""
    spec = importlib.util.spec_from_file_location(name, FIGURES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with matplotlib.rc_context(STYLE):
        figure = module.draw()
        figure.savefig(images / f"{name}.svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return images / f"{name}.svg"


def main() -> None:
    names = sorted(path.stem for path in FIGURES.glob("*.py"))
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("names", nargs="*", help="figures to draw; none: all")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images", help="folder to write to")
    args = parser.parse_args()
    if unknown := sorted({*args.names} - {*names}):
        raise UserError(f"no figure {', '.join(unknown)}; there are {', '.join(names)}")
    args.images.mkdir(parents=True, exist_ok=True)
    for name in args.names or names:
        path = draw(name, args.images)
        print(f"{path.name}  {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    run_main(main)
