"""Download published MiniMind weights: a transformers folder into the project, or .pth files into out/.

    python scripts/download_model.py minimind-3                             # then: eval_llm.py --load_from minimind-3
    python scripts/download_model.py minimind-3-pytorch                     # lists the .pth files
    python scripts/download_model.py minimind-3-pytorch full_sft_768.pth    # into out/; then: eval_llm.py
    python scripts/download_model.py minimind-3-moe --hub huggingface

With a .pth comes the tokenizer it was trained with, in a folder beside it, and a .json that names both.
"""

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, not this folder

from model.chat import hash_tokenizer
from model.cli import Parser, UserError, run_main
from model.files import write_atomically
from model.weights import OUT_DIR, infer_config, read_metadata, read_state
from scripts.lib.download import (
    OWNERS,
    RemoteFile,
    add_hub_args,
    choose_files,
    download,
    is_complete,
    list_files,
    print_files,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def download_tokenizer(files: dict[str, RemoteFile], args: argparse.Namespace, folder: Path) -> str:
    """Fetch the tokenizer of a repository of .pth files into a folder in `folder`. → its hash

    The author keeps it with the transformers weights: minimind-3 has that of minimind-3-pytorch.
    """
    name = re.sub("-pytorch$", "", args.name, flags=re.IGNORECASE)
    if "tokenizer.json" not in files:
        files = list_files("model", name, args.hub, args.base_url)
    choose_files(files, ["tokenizer.json"])
    for file in TOKENIZER_FILES:
        if file in files:
            download(files[file], folder / name)
    return hash_tokenizer((folder / name / "tokenizer.json").read_text("utf-8"))


def download_weight(file: RemoteFile, folder: Path, tokenizer_hash: str, source: str) -> None:
    """Fetch a .pth and write its .json (tokenizer, source, sizes). Raises UserError rather than replace another."""
    path = folder / file.path
    metadata = {"tokenizer": tokenizer_hash, "own_template": True, "source": source}
    known = read_metadata(path)
    if path.exists() and known.get("source") != source and not is_complete(path, file):
        raise UserError(f"{path} is there and is not the published file; move it, or name another folder with --target")
    download(file, folder)
    with contextlib.suppress(UserError):  # of a LoRA only the tokenizer is known
        metadata["config"] = infer_config(read_state(path), path)
    write_atomically(path.with_suffix(".json"), json.dumps(known | metadata, indent=1))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="repository of MiniMind's author: minimind-3, minimind-3-moe, minimind-3-pytorch")
    parser.add_argument("files", nargs="*",
                        help="files to download (default: the whole folder; of .pth files, list them)")
    parser.add_argument("--target", type=Path, help="folder to write to (default: out/ for .pth, else the name)")
    add_hub_args(parser)
    args = parser.parse_args()
    files = list_files("model", args.name, args.hub, args.base_url)
    is_native = any(name.endswith(".pth") for name in files)
    if is_native and not args.files:
        print_files(files)
        return
    folder = args.target or (OUT_DIR if is_native else ROOT / args.name)
    chosen = choose_files(files, args.files or [name for name in sorted(files) if not name.startswith(".")])
    weights = [file for file in chosen if file.path.endswith(".pth")]
    tokenizer_hash = download_tokenizer(files, args, folder) if weights else ""
    for file in chosen:
        if file in weights:
            download_weight(file, folder, tokenizer_hash, f"{OWNERS[args.hub]}/{args.name}")
        else:
            download(file, folder)


if __name__ == "__main__":
    run_main(main)
