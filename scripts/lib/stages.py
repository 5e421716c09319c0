"""The training stages in their order, and how they are run: for `make demo`, `make demo-all` and full runs.

A `Pipeline` runs steps (a stage, its data, an evaluation) and records the flags, seconds and result of each in a file,
so that the same command goes on where it was stopped. `STAGES` holds each stage's script and the flags that suit the
sample world.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from model.cli import Failure, UserError
from model.device import cpu_has_amx
from model.files import write_atomically
from model.weights import OUT_DIR, ROOT

SAMPLE = ROOT / "dataset/sample"
HIDDEN_SIZE = 256 if torch.cuda.is_available() or cpu_has_amx() else 128  # what learns enough in the time
COMMON = {"hidden_size": HIDDEN_SIZE, "max_seq_len": 512, "epochs": 1, "batch_size": 4, "accumulation_steps": 1,
          "use_compile": 1, "optimizer": "muon", "warmup_ratio": 0.05, "log_interval": 40, "save_interval": 400}


@dataclass(frozen=True)
class Stage:
    """One training script, the rows it learns from, and its flags beside COMMON."""

    name: str  # of the weight it writes
    script: str
    rows: str  # its files are {rows}.jsonl and {rows}_val.jsonl
    flags: dict
    in_demo: bool = False  # else only part of `make demo-all`
    scoring: dict | None = None  # other flags of score_sample.py than --weight {name}
    answers: bool = True  # whether its weight can be scored by its answers

    @property
    def hidden_size(self) -> int:
        return self.flags.get("hidden_size", HIDDEN_SIZE)

    @property
    def log(self) -> Path:
        return OUT_DIR / "logs" / f"{self.name}_{self.hidden_size}.jsonl"

    @property
    def sample_flags(self) -> dict:
        """The flags that suit the sample world."""
        return {**COMMON, "save_weight": self.name, **self.flags}

    def data_flags(self, folder: Path) -> dict:
        return {"data_path": folder / f"{self.rows}.jsonl", "val_data_path": folder / f"{self.rows}_val.jsonl"}


LONG_ROWS = {"max_seq_len": 1024, "batch_size": 2}  # as many tokens per step as 4 rows of 512, and 8% faster
CHAT_ROWS = {"empty_think_ratio": 1, "system_prompt_ratio": 0}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "from_weight": "none", "learning_rate": 4e-3, "weight_decay": 0.1, "max_steps": 300, **CHAT_ROWS}
ONLINE = {"thinking_ratio": 0, "num_generations": 8, "optimizer": "adamw", "learning_rate": 2e-4, "use_compile": 0,
          "log_interval": 4}
SINGLE_TURN = {**ONLINE, "batch_size": 8, "accumulation_steps": 4, "max_seq_len": 256, "max_gen_len": 64,
               "reward_mix": "exact=1,format=0.2,length=0,repetition=0"}
GROUPS = {**SINGLE_TURN, "beta": 0, "max_steps": 12}
STAGES = (
    Stage("pretrain", "trainer/train_pretrain.py", "pretrain", {
        **LONG_ROWS, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "learning_rate": 4e-3, "weight_decay": 0.1}, in_demo=True, answers=False),  # it only continues texts
    Stage("full_sft", "trainer/train_full_sft.py", "sft", {
        **LONG_ROWS, "learning_rate": 4e-3, "weight_decay": 0.1, **CHAT_ROWS}, in_demo=True),
    Stage("lora_identity", "trainer/train_lora.py", "lora_identity", {
        "optimizer": "adamw", "epochs": 4, "batch_size": 2, "learning_rate": 1e-3, **CHAT_ROWS},
        scoring={"weight": "full_sft", "lora_weight": "lora_identity",
                 "data_path": (SAMPLE / "heldout.jsonl", SAMPLE / "lora_identity_val.jsonl")}),
    Stage("dpo", "trainer/train_dpo.py", "dpo", {"optimizer": "adamw", "batch_size": 1, "learning_rate": 3e-5}),
    Stage("reward", "trainer/train_reward.py", "reward", {
        "optimizer": "adamw", "batch_size": 2, "learning_rate": 6e-4, "weight_decay": 0.1, "extra_layers": 2,
        "token_weight": 1},
        answers=False),
    Stage("small_sft", "trainer/train_full_sft.py", "sft", SMALL),
    Stage("full_dist", "trainer/train_distillation.py", "sft", {  # small_sft, taught
        **SMALL, "teacher_hidden_size": HIDDEN_SIZE, "teacher_use_moe": 0, "temperature": 1}),
    Stage("grpo", "trainer/train_grpo.py", "rlaif", {**GROUPS, "loss_type": "grpo"}),
    Stage("cispo", "trainer/train_grpo.py", "rlaif", {**GROUPS, "loss_type": "cispo"}),
    Stage("ppo_actor", "trainer/train_ppo.py", "rlaif", {
        **SINGLE_TURN, "critic_learning_rate": 5e-4, "kl_coef": 0, "update_epochs": 1, "target_kl": 0,
        "learning_rate": 1e-4, "max_steps": 24}),
    Stage("agent", "trainer/train_agent.py", "agent_rl", {
        **ONLINE, "num_generations": 4, "max_seq_len": 512, "max_gen_len": 96, "max_total_len": 768, "max_turns": 4,
        "loss_type": "grpo", "beta": 0.02, "accumulation_steps": 4, "max_steps": 10}, in_demo=True),
)
CHAT = ("你好！", "Who are you?", "217 + 8等于多少？", "What is the colour of the ink cat?")


def command(script: str, flags: dict) -> list[str]:
    """The words of a command line; a tuple is a flag of several values."""
    words = [script]
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def run(script: str, flags: dict, show: bool = True) -> str:
    """Run a script of the repository, as a user would. → what it printed, also shown as it comes, if `show`.

    Raises UserError or Failure when it fails. An interrupt makes the script save and end, and is raised then.
    """
    words = command(script, flags)
    print(f"\n$ python {' '.join(words).replace(f'{ROOT}/', '')}", flush=True)
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8",
                               env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"})
    output = []
    try:
        for line in process.stdout:
            output.append(line)
            if show:
                print(line, end="", flush=True)
    except KeyboardInterrupt:
        process.terminate()
        process.communicate()
        raise
    if status := process.wait():
        raise (UserError if status == 2 else Failure)(f"{script} ended with status {status}")
    return "".join(output)


class Pipeline:
    """Steps that are each run once. `path` keeps what is known of each: flags, seconds, whether it is done, result."""

    def __init__(self, path: Path, resume: bool = True):
        self.path = path
        self.records: dict[str, dict] = json.loads(path.read_text("utf-8")) if resume and path.is_file() else {}

    def end_times(self) -> dict[str, float]:
        """When each step that is done ended."""
        return {name: record["ended"] for name, record in self.records.items() if record["done"]}

    def run(self, name: str, flags: dict, work: Callable[[], object], after: float | None = None,
            discard: Callable[[], None] = lambda: None) -> None:
        """Do the `work` of a step and record it, with the dict it returns if any; or skip it where it is done.

        `after`: when the step that it builds on ended. Where that or a flag has changed since it was begun, call
        `discard` and begin anew.
        """
        flags = {key: str(value) for key, value in flags.items()}
        record = self.records.get(name)
        if record and (changes := self._changes(record, flags, after)):
            print(f"{name}: starts over: {'; '.join(changes)}")
            record = None
        if record and record["done"]:
            return print(f"{name}: already done")
        if record is None:
            discard()
            record = self.records[name] = {"flags": flags, "after": after, "done": False, "seconds": 0.0}
        self._save()
        start = time.perf_counter()
        try:
            result = work()
            record |= {"done": True, "ended": time.time()} | ({"found": result} if isinstance(result, dict) else {})
        finally:
            record["seconds"] += time.perf_counter() - start
            self._save()

    @staticmethod
    def _changes(record: dict, flags: dict, after: float | None) -> list[str]:
        """Why a step that was begun has to begin anew."""
        old = record["flags"]
        changed = [f"--{key} was {old.get(key)}, is {flags.get(key)}" for key in sorted({*old, *flags})
                   if old.get(key) != flags.get(key)]
        return changed + ["what it starts from was made anew"] * (record["after"] != after)

    def _save(self) -> None:
        write_atomically(self.path, json.dumps(self.records, indent=1, ensure_ascii=False))
