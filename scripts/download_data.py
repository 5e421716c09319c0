"""Download the published MiniMind data files into dataset/; without a name, list them.

    python scripts/download_data.py
    python scripts/download_data.py pretrain_t2t_mini.jsonl sft_t2t_mini.jsonl
    python scripts/download_data.py rlaif.jsonl --hub huggingface --base_url https://hf-mirror.com
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, not this folder

from model.cli import Parser, run_main
from scripts.lib.download import add_hub_args, choose_files, download, list_files, print_files


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files to download (default: list what there is, with sizes)")
    parser.add_argument("--target", type=Path, default=ROOT / "dataset", help="folder to write to (default: dataset/)")
    add_hub_args(parser)
    args = parser.parse_args()
    files = list_files("dataset", "minimind_dataset", args.hub, args.base_url)
    if not args.files:
        print_files(files)
    for file in choose_files(files, args.files):
        download(file, args.target)


if __name__ == "__main__":
    run_main(main)
