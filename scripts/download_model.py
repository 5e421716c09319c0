"""Download published MiniMind weights: a transformers folder into the project, or .pth files into out/.

    python scripts/download_model.py minimind-3                             # then: eval_llm.py --load_from minimind-3
    python scripts/download_model.py minimind-3-pytorch                     # lists the .pth files
    python scripts/download_model.py minimind-3-pytorch full_sft_768.pth    # into out/
    python scripts/download_model.py minimind-3-moe --hub huggingface
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, not this folder

from model.cli import Parser, run_main
from model.weights import OUT_DIR
from scripts.lib.download import add_hub_args, choose_files, download, list_files, print_files


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="repository of MiniMind's author: minimind-3, minimind-3-moe, minimind-3-pytorch")
    parser.add_argument("files", nargs="*", help="names of files; none takes the folder, or lists .pth files")
    parser.add_argument("--target", type=Path, help="folder to write to (default: out/ for .pth, else the name)")
    add_hub_args(parser)
    args = parser.parse_args()
    files = list_files("model", args.name, args.hub, args.base_url)
    weights = any(name.endswith(".pth") for name in files)
    if weights and not args.files:
        print_files(files)
        return
    folder = args.target or (OUT_DIR if weights else ROOT / args.name)
    for file in choose_files(files, args.files or [name for name in sorted(files) if not name.startswith(".")]):
        download(file, folder)


if __name__ == "__main__":
    run_main(main)
