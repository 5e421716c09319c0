"""The stages in their order, the flags that suit the sample world, and how one is run: for the demo and full runs."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from model.cli import Failure, UserError
from model.device import cpu_has_amx
from model.weights import OUT_DIR, ROOT

SAMPLE = ROOT / "dataset/sample"
HIDDEN_SIZE = 256 if torch.cuda.is_available() or cpu_has_amx() else 128  # what learns enough in the time
SIZE = ("--hidden_size", HIDDEN_SIZE)
COMMON = (*SIZE, "--max_seq_len", 512, "--epochs", 1, "--batch_size", 4, "--accumulation_steps", 1, "--use_compile", 1,
          "--optimizer", "muon", "--warmup_ratio", 0.05, "--log_interval", 40, "--save_interval", 400)


@dataclass
class Stage:
    """One training script with the flags that suit the sample world."""

    name: str  # of the weight it writes
    script: str
    flags: tuple
    main_path: bool = True  # else only part of `make demo-all`
    scored: tuple | None = ()  # flags that make score_sample.py answer with it; None: it does not answer
    hidden_size: int = HIDDEN_SIZE

    @property
    def log(self) -> Path:
        return OUT_DIR / "logs" / f"{self.name}_{self.hidden_size}.jsonl"


LONG_ROWS = ("--max_seq_len", 1024, "--batch_size", 2)  # as many tokens a step as 4 rows of 512, and 8% faster
SMALL = ("--hidden_size", 64, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--num_key_value_heads", 1,
         "--from_weight", "none", "--data_path", SAMPLE / "sft.jsonl", "--val_data_path", SAMPLE / "sft_val.jsonl",
         "--learning_rate", "4e-3", "--empty_think_ratio", 1, "--system_prompt_ratio", 0, "--max_steps", 300)
ONLINE = ("--thinking_ratio", 0, "--num_generations", 8, "--optimizer", "adamw", "--learning_rate", "2e-4",
          "--use_compile", 0, "--log_interval", 4)
ANSWERS = (*ONLINE, "--data_path", SAMPLE / "rlaif.jsonl", "--val_data_path", SAMPLE / "rlaif_val.jsonl",
           "--batch_size", 8, "--accumulation_steps", 4, "--max_seq_len", 256, "--max_gen_len", 64,
           "--reward_mix", "exact=1,format=0.2,length=0,repetition=0")
GROUPS = (*ANSWERS, "--beta", 0, "--max_steps", 12)
STAGES = (
    Stage("pretrain", "trainer/train_pretrain.py", (
        *LONG_ROWS, "--data_path", SAMPLE / "pretrain.jsonl", "--val_data_path", SAMPLE / "pretrain_val.jsonl",
        "--num_hidden_layers", 4, "--num_attention_heads", 4, "--num_key_value_heads", 2, "--learning_rate", "4e-3"),
        scored=None),  # it only continues texts
    Stage("full_sft", "trainer/train_full_sft.py", (
        *LONG_ROWS, "--data_path", SAMPLE / "sft.jsonl", "--val_data_path", SAMPLE / "sft_val.jsonl",
        "--learning_rate", "4e-3", "--empty_think_ratio", 1, "--system_prompt_ratio", 0)),
    Stage("lora_identity", "trainer/train_lora.py", (
        "--data_path", SAMPLE / "lora_identity.jsonl", "--val_data_path", SAMPLE / "lora_identity_val.jsonl",
        "--optimizer", "adamw", "--epochs", 4, "--batch_size", 2, "--learning_rate", "1e-3", "--lora_alpha", 16,
        "--empty_think_ratio", 1, "--system_prompt_ratio", 0), False,
        ("--weight", "full_sft", "--lora_weight", "lora_identity",
         "--data_path", SAMPLE / "heldout.jsonl", SAMPLE / "lora_identity_val.jsonl")),
    Stage("dpo", "trainer/train_dpo.py", (
        "--data_path", SAMPLE / "dpo.jsonl", "--val_data_path", SAMPLE / "dpo_val.jsonl",
        "--optimizer", "adamw", "--batch_size", 1, "--learning_rate", "3e-5"), False),
    Stage("reward", "trainer/train_reward.py", (
        "--data_path", SAMPLE / "reward.jsonl", "--val_data_path", SAMPLE / "reward_val.jsonl",
        "--optimizer", "adamw", "--batch_size", 2, "--learning_rate", "6e-4", "--extra_layers", 2,
        "--token_weight", 1), False, None),
    Stage("small_sft", "trainer/train_full_sft.py", (*SMALL, "--save_weight", "small_sft"), False, SMALL[:2], 64),
    Stage("full_dist", "trainer/train_distillation.py", (
        *SMALL, "--teacher_hidden_size", HIDDEN_SIZE, "--temperature", 1), False, SMALL[:2], 64),  # small_sft, taught
    Stage("grpo", "trainer/train_grpo.py", (*GROUPS, "--loss_type", "grpo"), False),
    Stage("cispo", "trainer/train_grpo.py", (*GROUPS, "--loss_type", "cispo", "--save_weight", "cispo"), False),
    Stage("ppo_actor", "trainer/train_ppo.py", (
        *ANSWERS, "--critic_learning_rate", "5e-4", "--kl_coef", 0, "--update_epochs", 1, "--learning_rate", "1e-4",
        "--max_steps", 24), False),
    Stage("agent", "trainer/train_agent.py", (
        *ONLINE, "--data_path", SAMPLE / "agent_rl.jsonl", "--val_data_path", SAMPLE / "agent_rl_val.jsonl",
        "--num_generations", 4, "--max_seq_len", 384, "--max_gen_len", 96, "--max_total_len", 640, "--beta", "0.02",
        "--accumulation_steps", 4, "--max_steps", 10)),
)
CHAT = ("你好！", "Who are you?", "217 + 8等于多少？", "What is the colour of the ink cat?")


def run(*command: object, show: bool = True) -> str:
    """Run a script of the repository, as a user would. → what it printed, also shown as it comes, if `show`.

    Raises UserError or Failure when it fails. An interrupt makes the script save and end, and is raised then.
    """
    words = [str(part) for part in command]
    print(f"\n$ python {' '.join(words).replace(f'{ROOT}/', '')}", flush=True)
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8",
                               env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"})
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if show:
                print(line, end="", flush=True)
    except KeyboardInterrupt:
        process.terminate()
        process.communicate()
        raise
    if status := process.wait():
        raise (UserError if status == 2 else Failure)(f"{words[0]} ended with status {status}")
    return "".join(said)
