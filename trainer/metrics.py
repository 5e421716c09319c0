"""Metrics of a run: sums between two log lines, the jsonl file, and the tracker."""

import json
import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from model.cli import first_line
from model.files import write_atomically
from trainer.batches import GlobalBatch
from trainer.distributed import World
from trainer.losses import Loss


class IntervalMetrics:
    """Sums over the steps between two log lines. They stay on the device, which only `collect` waits for."""

    def __init__(self, device: torch.device):
        self.start, self.steps, self.num_items, self.num_tokens = time.perf_counter(), 0, 0, 0
        self.loss_sum = torch.zeros((), device=device)
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)  # every loss and gradient so far
        self.item_sums: dict[str, Tensor] = {}  # metrics of the loss, summed over items like the loss
        self.step_values: dict[str, list[float]] = {}  # metrics of the batches, which are averaged over steps
        self.empty_steps, self.zero_grad_steps = 0, torch.zeros((), dtype=torch.int64, device=device)

    def add_loss(self, loss: Loss) -> None:
        self.loss_sum += loss.loss_sum.detach()
        for name, value in loss.metrics.items():
            self.item_sums[name] = self.item_sums.get(name, 0) + value.detach()

    def add_step(self, batch: GlobalBatch, lr: float, grad_norm: Tensor, overflows: bool) -> None:
        """Call it after an optimizer step. `overflows`: a gradient scaler skips gradients that are not finite."""
        self.lr, self.grad_norm = lr, grad_norm
        self.is_finite &= torch.isfinite(self.loss_sum)
        if not overflows:
            self.is_finite &= torch.isfinite(grad_norm)
        self.steps += 1
        self.empty_steps += batch.num_items == 0
        self.zero_grad_steps += grad_norm == 0
        self.num_items += batch.num_items
        self.num_tokens += batch.num_tokens
        for name, value in batch.metrics.items():
            self.step_values.setdefault(name, []).append(value)

    def collect(self, world: World) -> dict[str, float]:
        """Means over the items or steps of all ranks. All of them call it. Waits for the device."""
        num_items = max(self.num_items, 1)
        loss = float(world.sum(self.loss_sum)) / num_items
        means = {name: float(world.sum(value)) / num_items for name, value in self.item_sums.items()}
        seconds = time.perf_counter() - self.start
        self.seconds_per_step = seconds / max(self.steps, 1)
        means |= {name: sum(values) / len(values) for name, values in self.step_values.items()}
        idle = {"empty_steps": self.empty_steps, "zero_grad_steps": int(self.zero_grad_steps)}
        return {"loss": loss, **means, "lr": self.lr, "grad_norm": float(self.grad_norm),
                "tokens_per_s": self.num_tokens / seconds, **{name: count for name, count in idle.items() if count}}


class MetricsLog:
    """The jsonl file of a run. A resumed run first drops the lines after its state."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        if resumed_step and path.exists():
            for line in path.read_text("utf-8").splitlines():
                with suppress(ValueError, KeyError):  # half a line of a run that was killed
                    lines += [line] if json.loads(line)["step"] <= resumed_step else []
        write_atomically(path, "".join(f"{line}\n" for line in lines))

    def write(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({key: rounded(value) for key, value in row.items()}) + "\n")


def rounded(value: object) -> object:
    """A float to 6 significant digits; None if it is not finite, which JSON cannot express."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Tracker:
    """SwanLab, if `enabled` and installed: online, or offline without a network. Its failures never stop a run."""

    def __init__(self, enabled: bool, project: str | None, name: str, config: dict, folder: Path, run_id: str | None):
        self.run = None
        if not enabled:
            return
        options = {"project": project, "experiment_name": name, "config": config, "logdir": str(folder / "swanlab")}
        if run_id:
            options |= {"id": run_id, "resume": "allow"}
        os.environ.setdefault("SWANLAB_INTERACTIVE", "false")  # never prompt for a login: without a key it is offline
        sigint_handler = signal.getsignal(signal.SIGINT)
        for mode in ("cloud", "offline"):
            try:
                import swanlab

                self.run = swanlab.init(mode=mode, **options)
                return
            except Exception as error:  # no package, no account, no network, …
                print(f"tracker: SwanLab {mode} failed ({first_line(error)})")
            finally:
                signal.signal(signal.SIGINT, sigint_handler)  # SwanLab would end the run at Ctrl-C

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
    """1h05m or 5m09s."""
    minutes = int(seconds) // 60
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{int(seconds) % 60:02d}s"
