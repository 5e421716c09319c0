"""Many ranks: every stage, however it is shared, takes the steps of one process; and what happens when a rank dies.

By default a part of the matrix is run; SCALING=all runs every stage with every strategy, on 4 ranks too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch
from lab import DEADLINE, ENVIRONMENT, ROOT, Lab, small_model, wait_for
from ranks import run_all
from torch.testing import assert_close

from benchmarks.dry_run import STATE
from trainer import train_pretrain
from trainer.distributed import World
from trainer.run import Run

CONFIGS = ROOT / "trainer/deepspeed"
ZERO = sorted(path.stem for path in CONFIGS.glob("*.json"))
ROLLOUTS = {"max_gen_len": 6, "batch_size": 4, "accumulation_steps": 2,
            "num_generations": 2, "log_interval": 1}
STAGES = {
    "pretrain": {}, "full_sft": {"from_weight": "teacher"},
    "lora": {"lora_name": "lora_identity", "learning_rate": 1e-3},
    "distillation": {"student_hidden_size": 64, "from_weight": "full_sft", "from_teacher_weight": "teacher",
                     "teacher_use_moe": 0},
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
    flags = {"batch_size": 2, "global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 3, "epochs": 4,
             "from_weight": "none" if stage == "pretrain" else "full_sft", **STAGES[stage], **flags}
    return {"stage": stage, "folder": str(lab.out.parent), "flags": flags}


def job(folder: Path, data: Path, runs: list[dict], ranks: int = 2) -> list[list[dict]]:
    """Do `runs` in one job. → what each rank holds at the end of each"""
    (folder / "runs.json").write_text(json.dumps({"data": str(data), "runs": runs}, default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               ROOT / "tests/ranks.py", folder]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=(20 if ALL else 2) * DEADLINE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((folder / f"held_{rank}.json").read_text()) for rank in range(ranks)]


def numbers(lab: Lab, stem: str) -> list[dict]:
    """The log, without what depends on the machine."""
    return [{name: value for name, value in row.items() if not name.startswith("rollout_") and name != "scoring_s"}
            for row in lab.log(stem)]


PART = [("pretrain", "fsdp"), ("pretrain", "zero2"), ("pretrain", "zero3"), ("full_sft", "zero1"), ("lora", "zero3"),
        ("distillation", "zero2_offload"), ("dpo", "fsdp"), ("reward", "zero3_offload"), ("grpo", "zero3"),
        ("agent", "fsdp"), ("ppo", "ddp"), ("ppo", "fsdp")]
ALL = os.environ.get("SCALING") == "all"
CASES = [(stage, strategy) for stage in STAGES for strategy in ("ddp", "fsdp", *ZERO)] if ALL else PART
SHARDED = ["fsdp", "zero2", "zero3"]
needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")


class Done:
    """All runs of this file, done: `place(name)` is the lab of one, `held[name]` what each of two ranks held."""

    def __init__(self, folder: Path, data: Path, ranks: int):
        self.folder, self.data, self.held = folder, data, {}
        runs, alone = {}, {}
        one_prompt = folder / "one_prompt.jsonl"  # so that only one rank generates when it is validated
        one_prompt.write_text((data / "rlaif.jsonl").read_text().split("\n")[0])
        for stage, strategy in CASES:
            flags = {"val_data_path": one_prompt} if stage == "grpo" else {}
            alone[stage] = run_of(self.place(stage), stage, **flags)
            runs[f"{stage} {strategy}"] = run_of(self.place(f"{stage} {strategy}"), stage, **flags, **how(strategy))
        moe = {"use_moe": 1, "eval_interval": 2, "val_data_path": data / "pretrain.jsonl"}  # 18 rows
        alone["moe"] = run_of(self.place("moe"), "pretrain", **moe)
        first = {"max_steps": 1}
        for strategy in SHARDED:
            place, twice = self.place(f"moe {strategy}"), {"activation_checkpointing": 1}
            runs[f"moe {strategy}"] = run_of(place, "pretrain", **twice, **moe, **how(strategy))
            name = f"handed to {strategy}"
            alone[name] = run_of(self.place(name), "pretrain", **first)
            runs[name] = run_of(self.place(name), "pretrain", from_resume=1, accumulation_steps=4, **how(strategy))
            del runs[name]["flags"]["global_batch_size"]  # kept: see Run
            name = f"handed by {strategy}"
            runs[name] = run_of(self.place(name), "pretrain", **first, **how(strategy))
            name = f"parts of {strategy}"
            runs[f"{name} 1"] = run_of(self.place(name), "pretrain", **first, **how(strategy))
            runs[f"{name} 2"] = run_of(self.place(name), "pretrain", from_resume=1, **how(strategy))
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
        weights = [{name: x for name, x in lab.weight(stem).items() if torch.is_tensor(x)} for lab in (one, many)]
        assert_close(weights[1], weights[0], rtol=0, atol=1e-3)
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
def test_so_do_experts_that_are_validated_and_whose_activations_are_computed_twice(done, strategy):
    done.same("moe", f"moe {strategy}", "moe")


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
    """After the run, so without gradients: benchmarks/dry_run.py --check counts them too."""
    whole = sum(p.numel() for p in small_model().parameters())
    for run in ("pretrain fsdp", "full_sft zero1", "pretrain zero2", "pretrain zero3"):
        for rank in done.held.get(run, ()):
            weights, _, moments = STATE[run.split()[1]](whole, len(done.held[run]))
            assert rank["weights"] == pytest.approx(weights, rel=0.02)
            assert rank["moments"] == pytest.approx(moments, rel=0.02)


# -- launchers ---------------------------------------------------------------------------------------------------------

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_when_a_rank_is_killed_all_end_and_say_which_and_a_resume_goes_on(lab):
    lab = lab()
    launcher = lab.start(launcher=TORCHRUN, epochs=4000, save_interval=2)
    wait_for((lab.checkpoints / "pretrain_64_resume.pth").exists, launcher)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(launcher.pid).children(recursive=True)}
    ranks["1"].kill()
    _, err = launcher.communicate(timeout=DEADLINE)
    assert launcher.returncode and "error: rank 0 lost its connection: no answer from rank 1" in err
    assert "--from_resume 1" in err and not any(rank.is_running() for rank in ranks.values())
    step = lab.state()["step"]
    lab.train(epochs=4000, from_resume=1, max_steps=step + 2)
    assert lab.state()["step"] == step + 2


def test_a_rank_that_failed_is_not_ended_by_the_launcher_before_it_said_why():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError), Run._handle_signals(SimpleNamespace(world=World(0, 2), stop_signal=None)):
            raise RuntimeError("gloo: connection closed by peer")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them: [(prefix of commands, interface), …]."""
    names = [f"minimind{os.getpid()}{end}" for end in "ab"]
    links = [f"mm{os.getpid()}{end}" for end in "ab"]
    commands = [f"netns add {names[0]}", f"netns add {names[1]}", f"link add {links[0]} type veth peer name {links[1]}"]
    for i, (name, link) in enumerate(zip(names, links, strict=True)):
        commands += [f"link set {link} netns {name}", f"-n {name} addr add 10.77.0.{i + 1}/24 dev {link}",
                     f"-n {name} link set {link} up", f"-n {name} link set lo up"]
    try:
        for command in commands:
            if not shutil.which("ip") or subprocess.run(["ip", *command.split()], capture_output=True).returncode:
                pytest.skip("network namespaces are not permitted here (they need root and iproute2)")
        yield [(("ip", "netns", "exec", name), link) for name, link in zip(names, links, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True) if shutil.which("ip") else None


def test_two_hosts_train_together(lab, two_hosts):
    flags = {"max_steps": 2, "global_batch_size": 4, "parallel": "fsdp"}
    processes = []
    for rank, (prefix, link) in enumerate(two_hosts):
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank),
                   "--nproc_per_node", "1", "--master_addr", "10.77.0.1", "--master_port", "29511",
                   "trainer/train_pretrain.py", *lab("two").flags(train_pretrain, **flags)]
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": link}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)
    lab("one").train(max_steps=2)
    assert_close(lab("two").losses(), lab("one").losses(), rtol=0, atol=1e-4)


@needs_deepspeed
@pytest.mark.skipif(not ALL, reason="half a minute of imports: SCALING=all")
def test_the_deepspeed_launcher_starts_a_stage_unchanged(lab, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    two = lab("two").start(launcher=("-m", "deepspeed.launcher.runner", "--num_gpus", "2"), max_steps=2,
                           global_batch_size=4, **how("zero1"))
    out, err = two.communicate(timeout=DEADLINE)
    assert two.returncode == 0 and "on 2 x cpu" in out, out + err
    lab("one").train(max_steps=2)
    assert_close(lab("two").losses(), lab("one").losses(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("flags, words", [
    ({"parallel": "fsdp"}, ["--parallel fsdp", "launcher", "torchrun"]),
    ({"parallel": "fsdp", "optimizer": "muon"}, ["--optimizer muon", "--parallel fsdp"]),
    ({"parallel": "deepspeed"}, ["--deepspeed_config", "trainer/deepspeed"]),
    ({"parallel": "deepspeed", "deepspeed_config": "nowhere.json"}, ["nowhere.json", "No such file"]),
    ({"parallel": "deepspeed", "deepspeed_config": ROOT / "tests/lab.py"}, ["lab.py", "zero_optimization"]),
])
def test_a_strategy_that_cannot_be_is_told_in_one_line(lab, capsys, monkeypatch, flags, words):
    if len(flags) > 1 or "deepspeed" in flags.values():
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    if "deepspeed" in flags.values():
        pytest.importorskip("deepspeed")
    lab().fails(capsys, 2, *words, **flags)


def test_more_processes_than_gpus_are_told_before_they_wait_for_each_other(lab, capsys, monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    lab().fails(capsys, 2, "rank 2", "the 2 GPUs", "--device cpu", device="auto")


def test_the_flag_that_the_deepspeed_launcher_adds_is_taken(lab):
    lab().train(max_steps=1, local_rank=0)


def test_deepspeed_is_imported_only_when_asked_for_and_missed_in_one_line(lab, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    lab("ddp").train(max_steps=1)
    capsys.readouterr()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    lab("zero").fails(capsys, 2, "pip install deepspeed", **how("zero1"))
