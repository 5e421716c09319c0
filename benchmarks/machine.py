"""What the benchmarks share: flags for the size of a model, and results with machine, versions, commit, command."""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from dataset.sample_world import World
from model.cli import Parser, positive_int
from model.device import cpu_has_bfloat16, synchronise
from model.files import write_atomically
from model.model_minimind import MiniMindConfig
from model.weights import ROOT


def model_parser(description: str) -> Parser:
    """A parser with the flags of the model that is measured, and of the device."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=positive_int, default=768)
    parser.add_argument("--num_hidden_layers", type=positive_int, default=8)
    parser.add_argument("--use_moe", type=int, choices=(0, 1), default=0)
    parser.add_argument("--device", default="auto")
    return parser


def model_config(args: argparse.Namespace) -> MiniMindConfig:
    return MiniMindConfig(args.hidden_size, args.num_hidden_layers, bool(args.use_moe))


def result_name(name: str, args: argparse.Namespace) -> str:
    """`{name}[_moe]_{hidden_size}x{num_hidden_layers}`"""
    return f"{name}{'_moe' * args.use_moe}_{args.hidden_size}x{args.num_hidden_layers}"


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Ids of our tokenizer, none of them special."""
    return [rng.randrange(36, 6400) for _ in range(length)]


def write_full_rows(path: Path, num_rows: int, num_chars: int = 1600) -> Path:
    """Rows of the synthetic sample world's text, joined until each has more than the 340 tokens of pretraining."""
    rng, lines = random.Random(0), []
    texts = [row["text"] for row in World(0).rows("pretrain", 2000)]
    for _ in range(num_rows):
        text = ""
        while len(text) < num_chars:
            text += f"{rng.choice(texts)}\n"
        lines.append(json.dumps({"text": text}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all the work it was given."""
    synchronise(device)
    return time.perf_counter()


def train(command: list, flags: dict, folder: Path) -> tuple[list[dict], str]:
    """Run a training script that saves to `folder`, in a process of its own. → the rows of its log, and its output"""
    words = [f"--{key}={value}" for key, value in flags.items()]
    output = subprocess.run([sys.executable, *command, *words, f"--save_dir={folder}", f"--checkpoint_dir={folder}"],
                            check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    log, = (folder / "logs").glob("*.jsonl")
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()], output


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def relative(argument: str) -> str:
    """A path in the repository or beside it, as it is typed in the repository."""
    return argument.replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../")


def machine() -> dict:
    """Date, machine, versions, commit and command of a measurement."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {
        "date": date.today().isoformat(), "cpu": cpu_name(), "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "bf16_units": cpu_has_bfloat16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__, "commit": commit,
        "command": " ".join(["python", *map(relative, sys.argv)]),
    }


def save_result(name: str, numbers: dict) -> None:
    """Write benchmarks/results/{name}.json."""
    path = ROOT / "benchmarks/results" / f"{name}.json"
    write_atomically(path, json.dumps({"machine": machine(), **numbers}, indent=1) + "\n")
    print(f"saved {path.relative_to(ROOT)}")
