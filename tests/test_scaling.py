"""Many ranks: every stage, however it is shared, takes the steps of one process; and what happens when a rank dies.

By default a part of the matrix is run; SCALING=all runs every stage with every strategy, on 4 ranks too.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lab import DEADLINE, ENVIRONMENT, ROOT, Lab
from ranks import run_all
from torch.testing import assert_close

CONFIGS = ROOT / "trainer/deepspeed"
ZERO = sorted(path.stem for path in CONFIGS.glob("*.json"))
ROLLOUTS = {"num_workers": None, "cache_dir": None, "max_gen_len": 6, "batch_size": 4, "accumulation_steps": 2,
            "num_generations": 2, "log_interval": 1}
STAGES = {
    "pretrain": {}, "full_sft": {}, "lora": {"lora_name": "lora_identity", "learning_rate": 1e-2},
    "distillation": {"student_hidden_size": 64, "from_weight": "full_sft", "from_teacher_weight": "teacher"},
    "dpo": {}, "reward": {}, "grpo": ROLLOUTS,
    "ppo": {**ROLLOUTS, "num_generations": 1, "update_epochs": 2, "mini_batches": 1, "critic_learning_rate": 1e-3},
}
STEMS = {"lora": "lora_identity_64", "distillation": "full_dist_64", "ppo": "ppo_actor_64"}


def how(strategy: str) -> dict:
    """The flags of "ddp", "fsdp" or the name of a DeepSpeed configuration."""
    if strategy not in ZERO:
        return {"parallel": strategy}
    return {"parallel": "deepspeed", "deepspeed_config": str(CONFIGS / f"{strategy}.json")}


def run_of(lab: Lab, stage: str, **flags) -> dict:
    """What `run_all` takes, and the weights it starts from."""
    lab.with_base().with_base("teacher") if stage != "pretrain" else None
    flags = {"batch_size": 2, "accumulation_steps": 4, "learning_rate": 1e-3, "max_steps": 3, "epochs": 4,
             "from_weight": "none" if stage == "pretrain" else "full_sft", **STAGES[stage], **flags}
    return {"stage": stage, "folder": str(lab.out.parent), "flags": flags}


def job(folder: Path, data: Path, runs: list[dict], ranks: int = 2) -> list[list[dict]]:
    """Do `runs` in one job. → what each rank holds at the end of each"""
    (folder / "runs.json").write_text(json.dumps({"data": str(data), "runs": runs}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               ROOT / "tests/ranks.py", folder]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((folder / f"held_{rank}.json").read_text()) for rank in range(ranks)]


def numbers(lab: Lab, stem: str) -> list[dict]:
    """The log, without what depends on the machine."""
    return [{name: value for name, value in row.items() if not name.startswith("rollout_") and name != "scoring_s"}
            for row in lab.log(stem)]


def same(one: Lab, many: Lab, stem: str, atol: float = 2e-5) -> None:
    """The losses and the rest of the log, the fp32 weights and moments, and the saved half-precision weights."""
    for ours, theirs in zip(numbers(one, stem), numbers(many, stem), strict=True):
        assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert_close(many.state(stem)["model"], one.state(stem)["model"], rtol=0, atol=atol)
    moments = [{number: each["exp_avg"] for number, each in lab.state(stem)["optimizers"][0]["state"].items()}
               for lab in (one, many)]
    assert_close(moments[1], moments[0], rtol=1e-3, atol=atol)
    assert_close(many.weight(stem), one.weight(stem), rtol=0, atol=1e-3)


DEFAULT = [("pretrain", "fsdp"), ("pretrain", "zero1"), ("pretrain", "zero2"), ("pretrain", "zero3"),
           ("full_sft", "zero2_offload"), ("full_sft", "zero3_offload"), ("lora", "fsdp"), ("lora", "zero3"), ("distillation", "fsdp"), ("dpo", "ddp"), ("dpo", "fsdp"),
           ("reward", "fsdp"), ("reward", "zero3"), ("grpo", "ddp"), ("grpo", "fsdp"), ("grpo", "zero3"),
           ("ppo", "fsdp"), ("ppo", "zero2")]
CASES = [(stage, strategy) for stage in STAGES for strategy in ("ddp", "fsdp", *ZERO)] \
    if os.environ.get("SCALING") == "all" else DEFAULT


@pytest.mark.parametrize("ranks", [2, 4] if os.environ.get("SCALING") == "all" else [2])
def test_every_stage_takes_the_steps_of_one_process_however_it_is_shared(lab, data, tmp_path, ranks):
    cases = [case for case in CASES if find_spec("deepspeed") or case[1] not in ZERO]
    runs = [run_of(lab(f"{stage} {strategy}"), stage, val_data_path=None, **how(strategy)) for stage, strategy in cases]
    job(tmp_path, data, runs, ranks)
    alone = [stage for stage in STAGES if any(stage == case[0] for case in cases)]
    run_all(data, [run_of(lab(stage), stage) for stage in alone])
    for stage, strategy in cases:
        try:
            same(lab(stage), lab(f"{stage} {strategy}"), STEMS.get(stage, f"{stage}_64"))
        except AssertionError as error:
            raise AssertionError(f"{stage} with {strategy}: {error}") from None
