"""What a measurement is worth nothing without: machine, versions, commit, command, date."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from model.weights import ROOT


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def machine() -> dict:
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "date": date.today().isoformat(), "cpu": cpu_name(), "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__, "commit": git.stdout.strip(),
        "command": " ".join(["python", *(argument.replace(f"{ROOT}/", "") for argument in sys.argv)]),
    }


def save_result(name: str, numbers: dict) -> None:
    """Write benchmarks/results/{name}.json."""
    path = ROOT / "benchmarks/results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **numbers}, indent=1) + "\n", "utf-8")
    print(f"saved {path.relative_to(ROOT)}")
