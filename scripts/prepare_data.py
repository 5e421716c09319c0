"""Turn a data file into tokens, once: a folder that every stage takes as its --data_path, on this machine or another.

    python scripts/prepare_data.py --kind pretrain --data_path dataset/pretrain_t2t_mini.jsonl --out pretrain_tokens
    python trainer/train_pretrain.py --data_path pretrain_tokens        # wherever the folder was carried
    python scripts/prepare_data.py --inspect my_rows.csv                # what it holds, and what of it is learned
    python scripts/prepare_data.py --clean my_rows.csv --out cleaned.jsonl

Two bytes per token, three where targets are marked (sft, dpo); the file itself is not needed any more.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import Parser, UserError, nonneg_int, num_positions, positive_int, run_main, seed_int
from scripts.lib.clean_data import clean
from scripts.lib.inspect_data import DATASETS, DEFAULT_LENGTHS, inspect
from trainer.arguments import add_sft_args, sft_options


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*DATASETS, "rl"],
                        help="kind of rows (sft: also for LoRA and distillation; rl: only with --inspect, which guesses"
                        " the kind)")
    parser.add_argument("--data_path", type=Path, help="file of rows in any format that dataset/formats.py lists")
    parser.add_argument("--out", type=Path, help="folder to create; with --clean, the file to write")
    parser.add_argument("--inspect", type=Path, metavar="FILE", help="only print what the file holds")
    parser.add_argument("--clean", type=Path, metavar="FILE",
                        help="drop broken, repetitive and (nearly) equal rows, see scripts/lib/clean_data.py")
    parser.add_argument("--min_chars", type=nonneg_int, default=10, help="--clean: shortest text, in characters")
    parser.add_argument("--max_chars", type=positive_int, default=200_000, help="--clean: longest text, in characters")
    parser.add_argument("--max_seq_len", type=num_positions,
                        help="row length to pack in advance (others are packed on first use)")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER_DIR, help="folder of the tokenizer")
    parser.add_argument("--skip_bad_rows", type=int, choices=(0, 1), default=0, help="1 leaves bad rows out")
    parser.add_argument("--seed", type=seed_int, default=42,
                        help="sft: the --seed of the training script (default: %(default)s)")
    add_sft_args(parser)
    args = parser.parse_args()
    if args.clean:
        parser.note_unused(args, ("kind", "data_path", "max_seq_len", "skip_bad_rows"), "without --clean")
    else:
        parser.note_unused(args, ("min_chars", "max_chars"), "with --clean")
    if args.inspect:
        if args.out or args.clean:
            parser.error("--inspect only prints: give it without --out and --clean")
        parser.note_unused(args, ("data_path", "skip_bad_rows"), "without --inspect")
        return inspect(args.inspect, args.kind, ChatTokenizer(args.tokenizer), args.max_seq_len, sft_options(args))
    if args.clean and args.out:
        return clean(args.clean, args.out, args.min_chars, args.max_chars)
    if args.kind not in DATASETS or not (args.data_path and args.out):
        parser.error(f"give --kind ({', '.join(DATASETS)}), --data_path and --out; or --inspect FILE; or --clean FILE "
                     "and --out")
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; remove it or name another folder")
    if not args.data_path.is_file():
        raise UserError(f"--data_path {args.data_path}: no such file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the unfinished folder is removed
    start = time.perf_counter()
    length = args.max_seq_len or DEFAULT_LENGTHS[args.kind]
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".prepare") as cache:
        data = DATASETS[args.kind](args.data_path, ChatTokenizer(args.tokenizer), length,
                                   skip_bad_rows=bool(args.skip_bad_rows), cache_dir=cache,
                                   **(sft_options(args) if args.kind == "sft" else {}))
        data.tokens = data.mask = None  # closes the files, which Windows wants before it renames
        os.rename(data.folder, args.out)
    seconds, size = time.perf_counter() - start, args.data_path.stat().st_size / 1e6
    print(f"{args.out}: {data.meta['tokens']:,} tokens in {data.meta['documents']:,} documents, from {size:,.1f} MB in "
          f"{seconds:.1f} s, {size / seconds:.1f} MB/s")


if __name__ == "__main__":
    run_main(main)
