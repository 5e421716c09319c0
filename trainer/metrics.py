"""What a run says about itself: one line on the screen, one object in a jsonl file, a tracker if asked for."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from model.cli import first_line


def flops_per_token(model: nn.Module, length: int) -> float:
    """Floating-point operations a token costs in training, forward and backward (Chowdhery et al. 2022, appendix B).

    6 a weight that takes part in a product (the head once, embedding look-ups none, of the experts the active ones),
    4 if it is frozen, and causal attention over `length` positions: half of 12 · layers · heads · head_dim · length.
    """
    config = model.config
    work = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    for name, p in model.named_parameters():
        if p.dim() >= 2 and (config.tie_word_embeddings or "embed_tokens" not in name):
            share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
            work += (6 if p.requires_grad else 4) * p.numel() * share
    return work


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What this machine reaches in a large matrix product, in FLOP/s: the measured 100% of MFU."""
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device)  # its own: measuring must not move the run's random numbers
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = math.inf
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GB: of the device, or of the process on a CPU (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class MetricsLog:
    """The jsonl file of a run. A resumed run first forgets the lines after its state."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resumed_step and path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= resumed_step else []
                except (ValueError, KeyError):  # half a line of a run that was killed
                    continue
        path.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def write(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({key: rounded(value) for key, value in row.items()}) + "\n")


def rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


class Tracker:
    """SwanLab, if `wanted` and installed: online, or offline without a network. Its failures never stop a run."""

    def __init__(self, wanted: bool, project: str | None, name: str, config: dict, folder: Path, run_id: str | None):
        self.run = None
        if not wanted:
            return
        options = {"project": project, "experiment_name": name, "config": config, "logdir": str(folder / "swanlab")}
        if run_id:
            options |= {"id": run_id, "resume": "allow"}
        os.environ.setdefault("SWANLAB_INTERACTIVE", "false")  # never ask: without a key it is offline
        on_interrupt = signal.getsignal(signal.SIGINT)
        for mode in ("cloud", "offline"):
            try:
                import swanlab

                self.run = swanlab.init(mode=mode, **options)
                return
            except Exception as error:  # no package, no account, no network, …
                print(f"tracker: SwanLab {mode} failed ({first_line(error)})")
            finally:
                signal.signal(signal.SIGINT, on_interrupt)  # SwanLab takes Ctrl-C for itself and ends the run

    @property
    def run_id(self) -> str | None:
        return getattr(self.run, "id", None)

    def log(self, row: dict) -> None:
        if self.run is not None:
            try:
                numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
                self.run.log(numbers, step=row["step"])
            except Exception as error:
                print(f"tracker: stopped: {first_line(error)}")
                self.run = None

    def close(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                print(f"tracker: {first_line(error)}")


def duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{int(seconds) % 60:02d}s"
