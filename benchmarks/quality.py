"""Does a choice learn better? Train the same small model on the same text with each choice, several seeds, and compare.

With --seconds every choice gets the same training time: a few steps show how fast it is, then it makes one pass over as
many rows as fit, from the front of the same text, and its learning-rate schedule ends with them. Otherwise every choice
of a seed gets the same rows in the same order. Start-up, compilation, tokenisation and validation are not counted.

    python benchmarks/quality.py --choices levers --seconds 60 --hidden_size 128 \\
        --data_path ../shared/data/pretrain.jsonl.gz --val_data_path ../shared/data/pretrain_val.jsonl.gz
    python benchmarks/quality.py --choices router --data_path … --val_data_path …
"""

import argparse
import math
import re
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.machine import model_parser, save_result, train
from dataset.reader import read_lines
from model.cli import UserError, nonneg_float, nonneg_int, positive_int, run_main
from model.weights import ROOT

# the recipe as published: padded rows, AdamW, 256 rows per step, eager
PLAIN = {"packing": 0, "optimizer": "adamw", "batch_size": 32, "accumulation_steps": 8, "learning_rate": 5e-4,
         "warmup_ratio": 0.02, "weight_decay": 0.1, "use_compile": 0}
PACKED, COMPILED, MUON = {"packing": 1}, {"use_compile": 1}, {"optimizer": "muon", "learning_rate": 2e-3}
SMALL_STEPS = {"batch_size": 8, "accumulation_steps": 1, "learning_rate": 2e-3, "warmup_ratio": 0.05}
FAST = {**PLAIN, **PACKED, **COMPILED, **SMALL_STEPS}
ALL = {**FAST, **MUON}
UNMASKED = {"document_masking": 0}  # no flag of the stage: see run_unmasked
CHOICES = {  # name → the flags of train_pretrain.py that make each choice
    "levers": {"plain": PLAIN,
               "+ packing": {**PLAIN, **PACKED, **UNMASKED},
               "+ packing, document masking": {**PLAIN, **PACKED},
               "+ compile": {**PLAIN, **COMPILED},
               "+ Muon": {**PLAIN, **MUON},
               "+ 8 rows a step, 2e-3": {**PLAIN, **SMALL_STEPS},
               "+ MoE": {**PLAIN, "use_moe": 1},
               "default": {**PLAIN, **PACKED, **COMPILED},
               "default, 8 rows a step, 2e-3": FAST,
               "… and Muon": ALL,
               "… and Muon, padded": {**ALL, "packing": 0},
               "… and Muon, eager": {**ALL, "use_compile": 0},
               "… and Muon, no document masking": {**ALL, **UNMASKED},
               "… and Muon and MoE": {**ALL, "use_moe": 1}},
    "router": {"raw": {"use_moe": 1, "norm_topk_prob": 0, "optimizer": "muon"},
               "normalised": {"use_moe": 1, "norm_topk_prob": 1, "optimizer": "muon"}},
    "optimizer": {f"{optimizer} {rate}": {"optimizer": optimizer, "learning_rate": rate}
                  for optimizer in ("adamw", "muon") for rate in ("1e-3", "3e-3")},
    "packing": {"packed": {"packing": 1}, "padded": {"packing": 0}},
}
NUM_VAL_ROWS = 200
NUM_CALIBRATION_ROWS = 192  # that show how fast a choice is


def run_unmasked(flags: list[str]) -> None:
    """Run train_pretrain.py in this process; a token of a training row attends to all before it, of any document."""
    import torch

    from trainer import train_pretrain
    from trainer.batches import BatchStream

    def merged(batch: dict) -> dict:
        B, T = batch["input_ids"].shape
        bounds = (torch.arange(len(batch["cu_seqlens"]), dtype=torch.int32) * T).clamp(max=B * T)
        return batch | {"cu_seqlens": bounds, "position_ids": torch.arange(T).expand(B, T).contiguous()}

    def unmasked_init(stream, data, *arguments):
        original_init(stream, data, *arguments)
        batch = data.batch
        data.batch = lambda rows: merged(batch(rows))  # of the training rows only

    original_init = BatchStream.__init__
    with mock.patch.object(BatchStream, "__init__", unmasked_init), \
            mock.patch.object(sys, "argv", ["train_pretrain.py", *flags]):
        train_pretrain.main()


def train_choice(choice: dict, args: argparse.Namespace, data: Path, val: Path | None,
                 **overrides) -> tuple[list[dict], str]:
    """One run of train_pretrain.py. → the rows of its log, and its output"""
    with tempfile.TemporaryDirectory() as folder:
        flags = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers", "use_moe", "batch_size",
                                                        "device")}
        flags |= {"data_path": data, "cache_dir": folder, "use_compile": 1, "accumulation_steps": 1,
                  "learning_rate": 2e-3, "warmup_ratio": 0.05, "weight_decay": 0.1,
                  **({"val_data_path": val} if val else {})}
        flags |= choice | overrides
        masked = flags.pop("document_masking", 1)
        return train([ROOT / "trainer/train_pretrain.py"] if masked else [__file__, "--unmasked"], flags, Path(folder))


def outcome(log: list[dict]) -> dict:
    """The last validation, and the seconds of training; the first interval, which compiles, counts as the others."""
    last, first = log[-1], log[0]
    if len(log) > 1:
        seconds = sum((after["tokens"] - before["tokens"]) / after["tokens_per_s"]
                      for before, after in zip(log, log[1:], strict=False))
        seconds *= last["step"] / (last["step"] - first["step"])
    else:
        seconds = last["tokens"] / last["tokens_per_s"]
    return {"val_bpb": last["val_bpb"], "val_loss": last["val_loss"], "train_loss": last["loss"], "steps": last["step"],
            "tokens": last["tokens"], "seconds": seconds}


def train_for_seconds(choice: dict, args: argparse.Namespace, folder: Path, val: Path, seed: int) -> dict:
    """Train for --seconds on the front of the text, as much of it as fits."""
    half = max(1, NUM_CALIBRATION_ROWS // choice["batch_size"] // 2)
    sample = front(args.data_path, folder / "sample.jsonl", num_rows=2000)
    log, output = train_choice(choice, args, sample, None, max_steps=2 * half, log_interval=half, epochs=1000,
                               seed=seed, accumulation_steps=1)
    num_tokens, num_rows = (int(number.replace(",", "")) for number in re.search(
        r"([\d,]+) tokens in ([\d,]+) rows", output).groups())
    tokens_per_step = choice["batch_size"] * choice["accumulation_steps"] * num_tokens / num_rows
    num_steps = max(1, round(args.seconds * log[-1]["tokens_per_s"] / tokens_per_step))
    # a little less than the text of so many steps, else a last step has only a few rows
    num_bytes = num_steps * tokens_per_step * sample.stat().st_size / num_tokens * 0.99
    text = front(args.data_path, folder / "text.jsonl", num_bytes=num_bytes)
    return outcome(train_choice(choice, args, text, val, epochs=1, log_interval=max(1, num_steps // 10), seed=seed)[0])


def front(source: Path, target: Path, num_rows: int | None = None, num_bytes: float = math.inf) -> Path:
    """Write the first rows of a file: `num_rows`, or as many as have `num_bytes`."""
    with open(target, "wb") as file:
        for _, line in islice(read_lines(source), num_rows):
            if file.tell() >= num_bytes:
                return target
            file.write(line)
    if num_bytes < math.inf:
        raise UserError(f"--data_path {source}: too short for --seconds; it would have to be read twice")
    return target


def main() -> None:
    parser = model_parser(__doc__)
    parser.set_defaults(hidden_size=256, num_hidden_layers=4)
    parser.add_argument("--choices", choices=CHOICES, required=True)
    parser.add_argument("--only", nargs="+", default=[], help="of these choices, only those with such a name")
    parser.add_argument("--data_path", type=Path, required=True, help="text to train on")
    parser.add_argument("--val_data_path", type=Path, required=True, help=f"to compare on: {NUM_VAL_ROWS} rows")
    parser.add_argument("--seconds", type=nonneg_float, default=0, help="of training per choice (0: the same rows)")
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows per step")
    parser.add_argument("--epochs", type=positive_int, default=1)
    parser.add_argument("--max_steps", type=nonneg_int, default=0, help="stop after so many steps (0: all epochs)")
    args = parser.parse_args()
    if args.choices == "levers" and not args.seconds:
        parser.error("--choices levers are compared in the same time: give --seconds")
    choices = {name: flags for name, flags in CHOICES[args.choices].items() if not args.only or name in args.only}
    results: dict[str, list[dict]] = {name: [] for name in choices}
    with tempfile.TemporaryDirectory() as folder:
        val = front(args.val_data_path, Path(folder, "val.jsonl"), num_rows=NUM_VAL_ROWS)
        for seed in range(args.seeds):
            for name, choice in choices.items():
                results[name].append(
                    train_for_seconds(choice, args, Path(folder), val, seed) if args.seconds else
                    outcome(train_choice(choice, args, args.data_path, val, epochs=args.epochs, log_interval=50,
                                         max_steps=args.max_steps, seed=seed)[0]))
                print(f"seed {seed} {name:32} {results[name][-1]}", flush=True)
    print("| choice | bits per byte | seconds | tokens | steps |\n|---|---|---|---|---|")
    for name, runs in results.items():
        values, last = [run["val_bpb"] for run in runs], runs[-1]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"| {name} | {statistics.mean(values):.4f} ± {spread:.4f} | {seconds:.0f} | {last['tokens']:,} | "
              f"{last['steps']:,} |")
    time = f"_{args.seconds:g}s" if args.seconds else ""
    save_result(f"quality_{args.choices}{time}", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--unmasked"]:
        run_main(lambda: run_unmasked(sys.argv[2:]))
    else:
        run_main(main)
