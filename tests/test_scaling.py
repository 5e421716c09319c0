"""Many ranks: every stage, however it is shared, takes the steps of one process; and what happens when a rank dies.

By default a part of the matrix is run; SCALING=all runs every stage with every strategy, on 4 ranks too.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from lab import DEADLINE, ENVIRONMENT, ROOT, Lab, small_model
from ranks import run_all
from torch.testing import assert_close

CONFIGS = ROOT / "trainer/deepspeed"
ZERO = sorted(path.stem for path in CONFIGS.glob("*.json"))
ROLLOUTS = {"max_gen_len": 6, "batch_size": 4, "accumulation_steps": 2,
            "num_generations": 2, "log_interval": 1}
STAGES = {
    "pretrain": {}, "full_sft": {}, "lora": {"lora_name": "lora_identity", "learning_rate": 1e-3},
    "distillation": {"student_hidden_size": 64, "from_weight": "full_sft", "from_teacher_weight": "teacher"},
    "dpo": {}, "reward": {}, "grpo": ROLLOUTS,
    "agent": {**ROLLOUTS, "max_total_len": 128},
    "ppo": {**ROLLOUTS, "num_generations": 1, "update_epochs": 2, "mini_batches": 1, "critic_learning_rate": 1e-3},
}
STEMS = {"moe": "pretrain_64_moe", "lora": "lora_identity_64", "distillation": "full_dist_64", "ppo": "ppo_actor_64"}


def how(strategy: str) -> dict:
    """The flags of "ddp", "fsdp" or the name of a DeepSpeed configuration."""
    if strategy not in ZERO:
        return {"parallel": strategy}
    return {"parallel": "deepspeed", "deepspeed_config": str(CONFIGS / f"{strategy}.json")}


def run_of(lab: Lab, stage: str, **flags) -> dict:
    """What `run_all` takes, and the weights it starts from."""
    if stage != "pretrain":
        torch.manual_seed(0)
        lab.with_base().with_base("teacher")
    flags = {"batch_size": 2, "accumulation_steps": 4, "learning_rate": 1e-3, "max_steps": 3, "epochs": 4,
             "from_weight": "none" if stage == "pretrain" else "full_sft", **STAGES[stage], **flags}
    return {"stage": stage, "folder": str(lab.out.parent), "flags": flags}


def job(folder: Path, data: Path, runs: list[dict], ranks: int = 2) -> list[list[dict]]:
    """Do `runs` in one job. → what each rank holds at the end of each"""
    (folder / "runs.json").write_text(json.dumps({"data": str(data), "runs": runs}, default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               ROOT / "tests/ranks.py", folder]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=2 * DEADLINE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((folder / f"held_{rank}.json").read_text()) for rank in range(ranks)]


def numbers(lab: Lab, stem: str) -> list[dict]:
    """The log, without what depends on the machine."""
    return [{name: value for name, value in row.items() if not name.startswith("rollout_") and name != "scoring_s"}
            for row in lab.log(stem)]


PART = [("pretrain", "ddp"), ("pretrain", "zero1"), ("full_sft", "zero2_offload"), ("lora", "fsdp"), ("lora", "zero3"),
        ("distillation", "zero2"), ("dpo", "fsdp"), ("reward", "zero3_offload"), ("grpo", "fsdp"), ("grpo", "zero3"),
        ("agent", "fsdp"), ("ppo", "ddp"), ("ppo", "fsdp"), ("ppo", "zero3")]
ALL = os.environ.get("SCALING") == "all"
CASES = [(stage, strategy) for stage in STAGES for strategy in ("ddp", "fsdp", *ZERO)] if ALL else PART
SHARDED = ["fsdp", "zero2", "zero3"]
VARIANTS = {"moe": {"use_moe": 1}, "recomputed": {"activation_checkpointing": 1},
            "validated": {"eval_interval": 2}}


class Done:
    """All runs of this file, done: `place(name)` is the lab of one, `held[name]` what each of two ranks held."""

    def __init__(self, folder: Path, data: Path, ranks: int):
        self.folder, self.data, self.held = folder, data, {}
        runs, alone = {}, {}
        for stage, strategy in CASES:
            alone[stage] = run_of(self.place(stage), stage)
            runs[f"{stage} {strategy}"] = run_of(self.place(f"{stage} {strategy}"), stage, **how(strategy))
        for name, flags in VARIANTS.items():
            flags |= {"val_data_path": data / "pretrain_val.jsonl"}
            alone[name] = run_of(self.place(name), "pretrain", **flags)
            for strategy in SHARDED:
                place = self.place(f"{name} {strategy}")
                runs[f"{name} {strategy}"] = run_of(place, "pretrain", **flags, **how(strategy))
        first = {"max_steps": 1, "epochs": 4}
        for strategy in SHARDED:
            name = f"handed to {strategy}"
            alone[name] = run_of(self.place(name), "pretrain", **first)
            runs[name] = run_of(self.place(name), "pretrain", from_resume=1, **how(strategy))
            name = f"handed by {strategy}"
            runs[name] = run_of(self.place(name), "pretrain", **first, **how(strategy))
            name = f"parts of {strategy}"
            runs[f"{name} 1"] = run_of(self.place(name), "pretrain", **first, **how(strategy))
            runs[f"{name} 2"] = run_of(self.place(name), "pretrain", from_resume=1, **how(strategy))
            runs[f"pretrain {strategy}"] = run_of(self.place(f"pretrain {strategy}"), "pretrain", **how(strategy))
        if not find_spec("deepspeed"):
            runs = {name: run for name, run in runs.items() if run["flags"].get("parallel") != "deepspeed"}
        run_all(data, list(alone.values()))
        by_rank = job(folder, data, list(runs.values()), ranks)
        self.held = {name: [held[i] for held in by_rank] for i, name in enumerate(runs)}
        last = [f"handed by {strategy}" for strategy in SHARDED if f"handed by {strategy}" in runs]
        run_all(data, [run_of(self.place(name), "pretrain", from_resume=1) for name in last])

    def place(self, name: str) -> Lab:
        return Lab(self.data, self.folder / name)

    def same(self, one: str, many: str, stage: str = "pretrain") -> None:
        """Losses and the rest of the log, fp32 weights and moments, and the saved half-precision weights."""
        if many not in self.held:
            pytest.skip("deepspeed is not installed")
        one, many, stem = self.place(one), self.place(many), STEMS.get(stage, f"{stage}_64")
        for ours, theirs in zip(numbers(one, stem), numbers(many, stem), strict=True):
            assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        assert_close(many.state(stem)["model"], one.state(stem)["model"], rtol=0, atol=2e-5)
        states = [lab.state(stem)["optimizers"][0]["state"] for lab in (one, many)]
        assert_close(states[1], states[0], rtol=1e-3, atol=2e-5)
        saved = [{key: value for key, value in lab.weight(stem).items() if torch.is_tensor(value)}
                 for lab in (many, one)]
        assert_close(*saved, rtol=0, atol=1e-3)
        assert many.card(stem)["config"] == one.card(stem)["config"]


@pytest.fixture(scope="module", params=[2, 4] if ALL else [2])
def done(request, tmp_path_factory, data) -> Done:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ):
        yield Done(tmp_path_factory.mktemp("scaling"), data, request.param)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("stage, strategy", CASES)
def test_every_stage_takes_the_steps_of_one_process_however_it_is_shared(done, stage, strategy):
    done.same(stage, f"{stage} {strategy}", stage)


@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_so_do_experts_recomputed_activations_and_validation(done, variant, strategy):
    done.same(variant, f"{variant} {strategy}", "moe" if variant == "moe" else "pretrain")


@pytest.mark.parametrize("strategy", SHARDED)
def test_a_run_goes_on_with_another_number_of_ranks_and_another_strategy(done, strategy):
    done.same("pretrain", f"handed to {strategy}")
    done.same("pretrain", f"handed by {strategy}")


@pytest.mark.parametrize("strategy", SHARDED)
def test_with_as_many_ranks_it_goes_on_bit_for_bit(done, strategy):
    if f"pretrain {strategy}" not in done.held:
        pytest.skip("deepspeed is not installed")
    assert done.place(f"parts of {strategy}").ended_like(done.place(f"pretrain {strategy}"))


def test_each_rank_holds_its_share(done):
    whole = sum(p.numel() for p in small_model().parameters()) * 4
    for strategy, shares in (("fsdp", True), ("zero2", False), ("zero3", True)):
        for rank in done.held.get(f"pretrain {strategy}", ()):
            ranks = len(done.held[f"pretrain {strategy}"])
            assert rank["weights"] == pytest.approx(whole / (ranks if shares else 1), rel=0.02)
            assert rank["moments"] == pytest.approx(2 * whole / ranks, rel=0.02)
