"""Does a choice learn better? Train the same small model on the same text with each choice, several seeds, and compare.

With --seconds every choice gets the same time of training: a few steps tell how fast it is, then it goes once over as
many rows as it can, from the front of the same text, and its learning-rate schedule ends with them. Else the same rows
in the same order for every choice of a seed. Start-up, compiling, tokenising and validation are not counted.

    python benchmarks/quality.py --choices levers --seconds 60 --hidden_size 128 \\
        --data_path ../shared/data/pretrain.jsonl.gz --val_data_path ../shared/data/pretrain_val.jsonl.gz
    python benchmarks/quality.py --choices router --data_path … --val_data_path …
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.machine import save_result
from dataset.lm_dataset import read_rows
from model.cli import Parser, UserError, nonneg_float, positive_int, run_main
from model.weights import ROOT

# the recipe as published: padded rows, AdamW, 256 rows a step, eager
PLAIN = ("--packing=0", "--optimizer=adamw", "--batch_size=32", "--accumulation_steps=8", "--learning_rate=5e-4",
         "--warmup_ratio=0.02", "--use_compile=0")
STEPS = ("--batch_size=8", "--accumulation_steps=1", "--learning_rate=2e-3", "--warmup_ratio=0.05")
MUON = ("--optimizer=muon", "--learning_rate=2e-3")
FAST = (*PLAIN, "--packing=1", "--use_compile=1", *STEPS)
ALL = (*FAST, *MUON)
WITHOUT_BOUNDS = "--no_document_masking"  # no flag of the stage: done here
CHOICES = {  # name → the flags of train_pretrain.py that make each choice
    "levers": {"plain": PLAIN,
               "+ packing": (*PLAIN, "--packing=1", WITHOUT_BOUNDS),
               "+ packing, document masking": (*PLAIN, "--packing=1"),
               "+ compile": (*PLAIN, "--use_compile=1"),
               "+ Muon": (*PLAIN, *MUON),
               "+ 8 rows a step, 2e-3": (*PLAIN, *STEPS),
               "+ MoE": (*PLAIN, "--use_moe=1"),
               "default": (*PLAIN, "--packing=1", "--use_compile=1"),
               "default, 8 rows a step, 2e-3": FAST,
               "… and Muon": ALL,
               "… and Muon, padded": (*ALL, "--packing=0"),
               "… and Muon, eager": (*ALL, "--use_compile=0"),
               "… and Muon, no document masking": (*ALL, WITHOUT_BOUNDS),
               "… and Muon and MoE": (*ALL, "--use_moe=1")},
    "router": {"raw": ("--use_moe=1", "--norm_topk_prob=0", "--optimizer=muon"),
               "normalised": ("--use_moe=1", "--norm_topk_prob=1", "--optimizer=muon")},
    "optimizer": {"adamw 1e-3": ("--optimizer=adamw", "--learning_rate=1e-3"),
                  "adamw 3e-3": ("--optimizer=adamw", "--learning_rate=3e-3"),
                  "muon 1e-3": ("--optimizer=muon", "--learning_rate=1e-3"),
                  "muon 3e-3": ("--optimizer=muon", "--learning_rate=3e-3")},
    "packing": {"packed": ("--packing=1",), "padded": ("--packing=0",)},
}


VAL_ROWS = 200
CALIBRATION = 192  # rows


def run_stage(flags: list[str]) -> None:
    """train_pretrain.py in this process, where each token of a training row sees all before it, of any document."""
    import torch

    from trainer import train_pretrain
    from trainer.batches import RowStream

    def merged(batch: dict) -> dict:
        B, T = batch["input_ids"].shape
        bounds = (torch.arange(len(batch["cu_seqlens"]), dtype=torch.int32) * T).clamp(max=B * T)
        return batch | {"cu_seqlens": bounds, "position_ids": torch.arange(T).expand(B, T).contiguous()}

    def begin(stream, data, *arguments):
        start(stream, data, *arguments)
        batch = data.batch
        data.batch = lambda wanted: merged(batch(wanted))  # of the training rows only

    start = RowStream.__init__
    with mock.patch.object(RowStream, "__init__", begin), mock.patch.object(sys, "argv", ["train_pretrain.py", *flags]):
        train_pretrain.main()


def train(flags: tuple[str, ...], args: argparse.Namespace, data: Path, val: Path | None, **last) -> tuple[list, str]:
    """One run of the stage script with `flags`, then `last`. → the rows of its log, and what it printed"""
    with tempfile.TemporaryDirectory() as folder:
        common = {"data_path": data, "save_dir": folder, "checkpoint_dir": folder, "cache_dir": folder,
                  "hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers, "use_compile": 1,
                  "batch_size": args.batch_size, "accumulation_steps": 1, "learning_rate": 2e-3,
                  "warmup_ratio": 0.05, **({"val_data_path": val} if val else {})}
        words = [*(f"--{name}={value}" for name, value in common.items()), *flags,
                 *(f"--{name}={value}" for name, value in last.items())]
        command = [ROOT / "trainer/train_pretrain.py"]
        if WITHOUT_BOUNDS in words:
            command = [__file__, "--stage", "--"]
            words.remove(WITHOUT_BOUNDS)
        said = subprocess.run([sys.executable, *command, *words], check=True, stdout=subprocess.PIPE, encoding="utf-8")
        log, = (Path(folder) / "logs").glob("*.jsonl")
        return [json.loads(line) for line in log.read_text("utf-8").splitlines()], said.stdout


def outcome(log: list[dict]) -> dict:
    """The last validation, and the seconds of training, where the first interval (it compiles) counts as the others."""
    last, first = log[-1], log[0]
    late = sum((after["tokens"] - before["tokens"]) / after["tokens_per_s"]
               for before, after in zip(log, log[1:], strict=False))
    seconds = late * last["step"] / (last["step"] - first["step"]) if late else last["tokens"] / last["tokens_per_s"]
    return {"val_bpb": last["val_bpb"], "val_loss": last["val_loss"], "train_loss": last["loss"], "steps": last["step"],
            "tokens": last["tokens"], "seconds": seconds}


def in_time(flags: tuple[str, ...], args: argparse.Namespace, folder: Path, val: Path, seed: int) -> dict:
    """Train for --seconds on the front of the text, as much of it as fits."""
    asked = dict(word[2:].split("=") for word in flags if "=" in word)
    rows_a_step = int(asked["batch_size"]) * int(asked["accumulation_steps"])
    half = max(1, CALIBRATION // int(asked["batch_size"]) // 2)
    few = front(args.data_path, folder / "few.jsonl", rows=2000)
    log, said = train(flags, args, few, None, max_steps=2 * half, log_interval=half, epochs=1000, seed=seed,
                      accumulation_steps=1)
    tokens, rows = (int(number.replace(",", "")) for number in re.search(r"([\d,]+) tokens in ([\d,]+) rows",
                                                                         said).groups())
    a_step = rows_a_step * tokens / rows
    steps = max(1, round(args.seconds * log[-1]["tokens_per_s"] / a_step))
    size = steps * a_step * few.stat().st_size / tokens * 0.99  # else a last step of a few rows
    text = front(args.data_path, folder / "text.jsonl", size=size)
    return outcome(train(flags, args, text, val, epochs=1, log_interval=max(1, steps // 10), seed=seed)[0])


def front(source: Path, target: Path, rows: int | None = None, size: float = math.inf) -> Path:
    """Write the first `rows` of a file, or its first `size` bytes."""
    with open(target, "wb") as file:
        for _, line in islice(read_rows(source), rows):
            if file.tell() >= size:
                return target
            file.write(line)
    if size < math.inf:
        raise UserError(f"--data_path {source}: too short for --seconds; it would have to be read twice")
    return target


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", choices=CHOICES, required=True)
    parser.add_argument("--only", nargs="+", default=[], help="of these choices, only those with such a name")
    parser.add_argument("--data_path", type=Path, required=True, help="text to train on")
    parser.add_argument("--val_data_path", type=Path, required=True, help=f"text to compare on: {VAL_ROWS} rows of it")
    parser.add_argument("--seconds", type=nonneg_float, default=0,
                        help="of training for each choice (0: the same rows)")
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--hidden_size", type=positive_int, default=256)
    parser.add_argument("--num_hidden_layers", type=positive_int, default=4)
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows a step")
    parser.add_argument("--epochs", type=positive_int, default=1)
    parser.add_argument("--max_steps", type=int, default=0, help="stop after so many steps (0: all epochs)")
    args = parser.parse_args()
    if args.choices == "levers" and not args.seconds:
        parser.error("--choices levers are compared in the same time: give --seconds")
    wanted = {name: flags for name, flags in CHOICES[args.choices].items() if not args.only or name in args.only}
    results: dict[str, list[dict]] = {choice: [] for choice in wanted}
    with tempfile.TemporaryDirectory() as folder:
        val = front(args.val_data_path, Path(folder, "val.jsonl"), rows=VAL_ROWS)
        for seed in range(args.seeds):
            for choice, flags in wanted.items():
                results[choice].append(
                    in_time(flags, args, Path(folder), val, seed) if args.seconds else
                    outcome(train(flags, args, args.data_path, val, epochs=args.epochs, log_interval=50,
                                  max_steps=args.max_steps, seed=seed)[0]))
                print(f"seed {seed} {choice:32} {results[choice][-1]}", flush=True)
    print("| choice | bits a byte | seconds | tokens | steps |\n|---|---|---|---|---|")
    for choice, runs in results.items():
        values = [run["val_bpb"] for run in runs]
        spread, last = statistics.stdev(values) if len(values) > 1 else 0.0, runs[-1]
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"| {choice} | {statistics.mean(values):.4f} ± {spread:.4f} | {seconds:.0f} | {last['tokens']:,} | "
              f"{last['steps']:,} |")
    time = f"_{args.seconds:g}s" if args.seconds else ""
    save_result(f"quality_{args.choices}{time}", results)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--stage", "--"]:
        run_main(lambda: run_stage(sys.argv[3:]))
    else:
        run_main(main)
