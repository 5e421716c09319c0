"""From random weights to a model that chats and calls tools, on two CPU cores, in minutes.

Writes the synthetic sample world, trains a small model on it stage by stage with the very scripts of `trainer/`, prints
what each stage gained on held-out cases, draws the loss curves and shows a short chat.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch

from model.errors import UserError, run_main
from model.weights import OUT_DIR, ROOT, cpu_has_bfloat16
from scripts.draw_curves import draw_curves, read_log
from trainer.arguments import Parser

SAMPLE = ROOT / "dataset/sample"
HIDDEN_SIZE = 256 if torch.cuda.is_available() or cpu_has_bfloat16() else 128  # what learns enough in the time
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


PAIRS = ("--data_path", SAMPLE / "dpo.jsonl", "--val_data_path", SAMPLE / "dpo_val.jsonl", "--optimizer", "adamw",
         "--batch_size", 2)
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
        "--data_path", SAMPLE / "pretrain.jsonl", "--val_data_path", SAMPLE / "pretrain_val.jsonl",
        "--num_hidden_layers", 4, "--num_attention_heads", 4, "--num_key_value_heads", 2, "--learning_rate", "4e-3"),
        scored=None),  # it only continues texts
    Stage("full_sft", "trainer/train_full_sft.py", (
        "--data_path", SAMPLE / "sft.jsonl", "--val_data_path", SAMPLE / "sft_val.jsonl",
        "--learning_rate", "4e-3", "--empty_think_ratio", 1, "--system_prompt_ratio", 0)),
    Stage("lora_identity", "trainer/train_lora.py", (
        "--data_path", SAMPLE / "lora_identity.jsonl", "--val_data_path", SAMPLE / "lora_identity_val.jsonl",
        "--optimizer", "adamw", "--epochs", 4, "--batch_size", 2, "--learning_rate", "1e-3", "--lora_alpha", 16,
        "--empty_think_ratio", 1, "--system_prompt_ratio", 0), False,
        ("--weight", "full_sft", "--lora_weight", "lora_identity",
         "--data_path", SAMPLE / "heldout.jsonl", SAMPLE / "lora_identity_val.jsonl")),
    Stage("dpo", "trainer/train_dpo.py", (*PAIRS, "--learning_rate", "2e-5"), False),
    Stage("reward", "trainer/train_reward.py", (*PAIRS, "--epochs", 2, "--learning_rate", "5e-4"), False, None),
    Stage("small_sft", "trainer/train_full_sft.py", (*SMALL, "--save_weight", "small_sft"), False, SMALL[:2], 64),
    Stage("full_dist", "trainer/train_distillation.py", (
        *SMALL, "--teacher_hidden_size", HIDDEN_SIZE, "--temperature", 1), False, SMALL[:2], 64),  # small_sft, taught
    Stage("grpo", "trainer/train_grpo.py", (*GROUPS, "--loss_type", "grpo"), False),
    Stage("cispo", "trainer/train_grpo.py", (*GROUPS, "--loss_type", "cispo", "--save_weight", "cispo"), False),
    Stage("ppo_actor", "trainer/train_ppo.py", (
        *ANSWERS, "--critic_learning_rate", "5e-4", "--kl_coef", 0, "--update_epochs", 1, "--max_steps", 24), False),
    Stage("agent", "trainer/train_agent.py", (
        *ONLINE, "--data_path", SAMPLE / "agent_rl.jsonl", "--val_data_path", SAMPLE / "agent_rl_val.jsonl",
        "--num_generations", 4, "--max_seq_len", 384, "--max_gen_len", 96, "--max_total_len", 640, "--beta", "0.02",
        "--accumulation_steps", 4, "--max_steps", 10)),
)
CHAT = ("你好！", "Who are you?", "217 + 8等于多少？", "What is the colour of the ink cat?")


def run(*command: object) -> None:
    """Run a script of the repository, as a user would; stop the demo if it fails."""
    print(f"\n$ python {' '.join(str(part).replace(f'{ROOT}/', '') for part in command)}", flush=True)
    status = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if status:
        raise UserError(f"{command[0]} ended with status {status}")


def score(stage: Stage) -> dict[str, float]:
    """Share of the held-out cases that the stage's weight answers exactly, a skill and in all."""
    if stage.scored is None:
        return {}
    target = OUT_DIR / "logs" / f"{stage.name}_scores.json"
    run("scripts/score_sample.py", "--weight", stage.name, *SIZE, *stage.scored, "--json", target)
    return json.loads(target.read_text("utf-8"))


def count_calls() -> None:
    """What the agent gained in using tools: the counts, not each case."""
    command = ["eval_toolcall.py", *map(str, SIZE), "--weight", "full_sft", "agent", "--benchmark", "50",
               "--cases", str(SAMPLE / "agent_rl_val.jsonl")]
    print(f"\n$ python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8",
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    if done.returncode:
        raise UserError(f"eval_toolcall.py ended with status {done.returncode}: {done.stderr.strip()}")
    print("\n".join(line for line in done.stdout.splitlines() if line[:1] not in "✅❌"))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every stage, not only the way to a chatting model")
    args = parser.parse_args()
    stages = [stage for stage in STAGES if args.all or stage.main_path]
    began = time.perf_counter()
    run("dataset/sample_world.py", "--out", SAMPLE)
    scores, minutes = {}, {}
    for stage in stages:
        start = time.perf_counter()
        run(stage.script, *COMMON, *stage.flags)
        minutes[stage.name] = (time.perf_counter() - start) / 60
        scores[stage.name] = score(stage)
    count_calls()
    for question in CHAT:
        run("eval_llm.py", *SIZE, "--temperature", 0, "--prompt", question)

    curves = OUT_DIR / "demo.png"
    draw_curves([stage.log for stage in stages], curves)
    skills = list({skill: None for of_stage in scores.values() for skill in of_stage})
    print("\nheld-out cases answered exactly, after each stage (the sample world is synthetic):")
    print(f"{'':12}{'minutes':>9}" + "".join(f"{skill:>{len(skill) + 4}}" for skill in skills))
    for name, of_stage in scores.items():
        cells = [f"{of_stage[skill]:.0%}" if skill in of_stage else "" for skill in skills]
        print(f"{name:13}{minutes[name]:8.1f}" + "".join(
            f"{cell:>{len(skill) + 4}}" for skill, cell in zip(skills, cells, strict=True)))
    print("\nheld-out rows of each stage's own, at its end (online RL: before and after):")
    for stage in stages:
        first, last = (read_log(stage.log)[place] for place in (0, -1))
        print(f"{stage.name:13} " + " ".join(
            f"{name} " + f"{first[name]:.3f} -> " * (first["step"] == 0) + f"{value:.3f}"
            for name, value in last.items() if name.startswith("val_")))
    print(f"\nloss curves: {curves.relative_to(ROOT)}   talk to it: .venv/bin/python eval_llm.py"
          f"   ({(time.perf_counter() - began) / 60:.1f} minutes in all)")


if __name__ == "__main__":
    run_main(main)
