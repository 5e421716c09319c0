"""Does a choice learn better? Train the same small model on the same text with each choice, several seeds, and compare.

The same rows in the same order for every choice of a seed; validation bits per byte at the end, and the wall time.

    python benchmarks/quality.py --choices router --data_path ../shared/data/pretrain_val.jsonl.gz ...
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.machine import save_result
from model.errors import run_main
from model.weights import ROOT
from trainer.arguments import Parser, positive

CHOICES = {  # name → the flags of train_pretrain.py that make each choice
    "router": {"raw": ("--use_moe=1", "--norm_topk_prob=0", "--optimizer=muon"),
               "normalised": ("--use_moe=1", "--norm_topk_prob=1", "--optimizer=muon")},
    "optimizer": {"adamw 1e-3": ("--optimizer=adamw", "--learning_rate=1e-3"),
                  "adamw 3e-3": ("--optimizer=adamw", "--learning_rate=3e-3"),
                  "muon 1e-3": ("--optimizer=muon", "--learning_rate=1e-3"),
                  "muon 3e-3": ("--optimizer=muon", "--learning_rate=3e-3")},
    "packing": {"packed": ("--packing=1",), "padded": ("--packing=0",)},
}


def train(flags: tuple[str, ...], args: argparse.Namespace, seed: int) -> dict:
    """One run of the stage script; → its last validation and its minutes."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"data_path": args.data_path, "val_data_path": args.val_data_path, "save_dir": folder,
                  "checkpoint_dir": folder, "hidden_size": args.hidden_size, "use_compile": 1, "seed": seed,
                  "num_hidden_layers": args.num_hidden_layers, "batch_size": args.batch_size, "log_interval": 50,
                  "accumulation_steps": 1, "epochs": args.epochs, "max_steps": args.max_steps,
                  "learning_rate": 2e-3, "warmup_ratio": 0.05}
        written = (f"--{name}={value}" for name, value in common.items())
        command = [sys.executable, ROOT / "trainer/train_pretrain.py", *written, *flags]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        minutes = (time.perf_counter() - began) / 60
        log, = (Path(folder) / "logs").glob("*.jsonl")
        row = json.loads(log.read_text("utf-8").splitlines()[-1])
        return {"val_loss": row["val_loss"], "val_bpb": row["val_bpb"], "train_loss": row["loss"], "minutes": minutes}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", choices=CHOICES, required=True)
    parser.add_argument("--data_path", type=Path, required=True, help="text to train on")
    parser.add_argument("--val_data_path", type=Path, required=True, help="text to compare on")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--hidden_size", type=positive, default=256)
    parser.add_argument("--num_hidden_layers", type=positive, default=4)
    parser.add_argument("--batch_size", type=positive, default=8, help="rows a step")
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--max_steps", type=int, default=0, help="stop after so many steps (0: all epochs)")
    args = parser.parse_args()
    results: dict[str, list[dict]] = {choice: [] for choice in CHOICES[args.choices]}
    for seed in range(args.seeds):
        for choice, flags in CHOICES[args.choices].items():
            results[choice].append(train(flags, args, seed))
            print(f"seed {seed} {choice:12} {results[choice][-1]}", flush=True)
    for choice, runs in results.items():
        values = [run["val_bpb"] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{choice:12} val_bpb {statistics.mean(values):.4f} ± {spread:.4f}")
    save_result(f"quality_{args.choices}", results)


if __name__ == "__main__":
    run_main(main)
