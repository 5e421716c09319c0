"""Runs one after the other in one process, or in each process of one job: starting them costs more than tiny runs."""

import json
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import torch.distributed as dist
from lab import Lab

from benchmarks.dry_run import measure_state
from trainer.rl.rewards import Rewards
from trainer.trainer import Trainer


def of_ids(_, trajectories) -> list[float]:
    """A reward that differs from answer to answer, whatever a model says."""
    return [sum(trajectory.completion_ids) % 97 / 97 for trajectory in trajectories]


def run_all(data: Path, runs: list[dict]) -> list[dict]:
    """Train as each of `runs` says: "stage", "folder", "flags". → of each, the bytes that this rank holds at the end"""
    held = []

    def measured(trainer: Trainer) -> None:
        fit(trainer)
        held.append(measure_state(trainer.strategy))

    fit = Trainer.fit
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Trainer, "fit", measured))
        for name in ("grpo", "ppo", "agent"):
            stack.enter_context(mock.patch(f"trainer.train_{name}.make_rewards",
                                           lambda *_, **__: Rewards({"ids": of_ids}, {"ids": 1.0})))
        for run in runs:
            print("run:", run["folder"], flush=True)
            Lab(data, Path(run["folder"])).train(import_module(f"trainer.train_{run['stage']}"), **run["flags"])
    return held


if __name__ == "__main__":
    job = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        asked = json.loads((job / "runs.json").read_text())
        held = run_all(Path(asked["data"]), asked["runs"])
    (job / f"held_{dist.get_rank()}.json").write_text(json.dumps(held))
