"""Useful training tokens per second: the default recipe against the plain one, same model, same file, in one run.

Plain: eager, fp32 on a CPU (bf16 autocast on CUDA), one document per row, truncated or padded to its length, logits
for every position, torch's AdamW. Default: `trainer/train_*.py` with --use_compile 1. Both in processes of their own,
in turn. Useful tokens are those of documents: padding does not count.

    python benchmarks/train_speed.py --stage sft --data_path ../shared/data/sft.jsonl.gz
    python benchmarks/train_speed.py --stage pretrain --data_path ../shared/data/pretrain_val.jsonl.gz
    python benchmarks/train_speed.py --stage pretrain --data_path ../shared/data/pretrain_val.jsonl.gz --use_moe 1
    python benchmarks/train_speed.py --stage lora --data_path ../shared/data/sft_val.jsonl.gz
    python benchmarks/train_speed.py --stage dpo --data_path ../shared/data/dpo_val.jsonl.gz --batch_size 4
    python benchmarks/train_speed.py --stage sft --data_path ../shared/data/sft_val.jsonl.gz --peer trl
    python benchmarks/train_speed.py --data_path ../shared/data/pretrain_val.jsonl.gz --peer transformers
"""

import argparse
import copy
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.machine import model_config, model_parser, result_name, save_result, train
from dataset.lm_dataset import DPODataset, PretrainDataset, SFTDataset, TokenDataset
from dataset.packing import IGNORE
from dataset.reader import read_rows
from model.chat import ChatTokenizer
from model.cli import Parser, nonneg_int, positive_int, run_main
from model.device import choose_device, cpu_has_bfloat16, peak_memory, synchronise, training_dtype
from model.model_lora import TARGETS, LoRAConfig, apply_lora, find_target_modules
from model.model_minimind import MiniMindForCausalLM
from model.transformers_io import save_folder
from model.weights import ROOT
from trainer.flops import flops_per_token, peak_flops
from trainer.losses import preference_losses

# rows, script, row length
STAGES = {"pretrain": (PretrainDataset, ROOT / "trainer/train_pretrain.py", 340),
          "sft": (SFTDataset, ROOT / "trainer/train_full_sft.py", 768),
          "lora": (SFTDataset, ROOT / "trainer/train_lora.py", 768),
          "dpo": (DPODataset, ROOT / "trainer/train_dpo.py", 1024)}


def padded(data: TokenDataset, documents: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """One document per row, truncated or padded. → ids and labels [documents, length], number of useful tokens"""
    ends = np.load(data.folder / "ends.npy")
    starts, num_useful = np.concatenate(([0], ends[:-1])), 0
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for row, document in enumerate(documents % len(ends)):
        stop = min(ends[document], starts[document] + length)
        text = torch.from_numpy(data.tokens[starts[document]:stop].astype(np.int64))
        mask = data.mask[starts[document]:stop] if data.has_loss_mask else np.ones(len(text), np.uint8)
        ids[row, :len(text)] = text
        labels[row, :len(text)] = text.masked_fill(torch.from_numpy(mask == 0), IGNORE)
        num_useful += len(text)
    return ids, labels, num_useful


def plain_loss(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor,
               reference: torch.nn.Module | None) -> torch.Tensor:
    """Next-token loss on all logits; with a `reference`, DPO's, of which every step runs both models."""
    output = model(ids)
    if reference is None:
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                               ignore_index=IGNORE)
    else:
        with torch.no_grad():
            theirs = reference(ids).logits
        ours, theirs = (-F.cross_entropy(x[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORE,
                                         reduction="none").sum(1) for x in (output.logits, theirs))
        loss = preference_losses(*(ours - theirs).chunk(2), "sigmoid", 0.1).mean()
    return loss if output.aux_loss is None else loss + model.config.router_aux_loss_coef * output.aux_loss


def plain_recipe(args: argparse.Namespace) -> dict:
    """Train as the plain recipe does. → useful tokens/s, MFU and peak memory of the steps after the warm-up"""
    dataset, _, length = STAGES[args.stage]
    device = choose_device(args.device)
    data = dataset(args.data_path, ChatTokenizer(), length, packing=False)
    model = MiniMindForCausalLM(model_config(args)).to(device)
    reference = copy.deepcopy(model) if args.stage == "dpo" else None
    if args.stage == "lora":
        apply_lora(model, LoRAConfig(targets=tuple(name for name in TARGETS if name in find_target_modules(model))))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    order = np.random.default_rng(0).permutation(len(data))
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            synchronise(device)
            start, num_useful = time.perf_counter(), 0
        rows = order[np.arange(step * args.batch_size, (step + 1) * args.batch_size) % len(order)]
        documents = np.concatenate((2 * rows, 2 * rows + 1)) if reference else rows
        ids, labels, num_tokens = padded(data, documents, length)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = plain_loss(model, ids.to(device), labels.to(device), reference)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= args.warmup:
            num_useful += num_tokens
    synchronise(device)
    speed = num_useful / (time.perf_counter() - start)
    peak = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {"tokens_per_s": speed, "mfu": speed * flops_per_token(model, length / 2) / peak,
            "memory_gb": peak_memory(device)}


def trl_recipe(args: argparse.Namespace) -> dict:
    """Train transformers' Qwen3 by TRL's SFTTrainer: packed rows, bf16 where the machine has it, eager. → as above

    Not compiled: the shapes of its packed rows differ from step to step, and each is compiled anew.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    _, _, length = STAGES[args.stage]
    device, times = choose_device(args.device), []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            synchronise(device)
            times.append(time.perf_counter())

    num_rows = 20 * args.batch_size * (args.warmup + args.steps)  # more than fills the steps
    rows = [{"messages": [{"role": message["role"], "content": message["content"]} for message in row["conversations"]]}
            for _, row in itertools.islice(read_rows(args.data_path, kind="chat"), num_rows)]
    with tempfile.TemporaryDirectory() as folder:
        save_folder(MiniMindForCausalLM(model_config(args)), folder, ChatTokenizer())
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        trainer = SFTTrainer(model, SFTConfig(
            folder, packing=True, max_length=length, per_device_train_batch_size=args.batch_size,
            assistant_only_loss=True, max_steps=args.warmup + args.steps, gradient_checkpointing=False,
            bf16=device.type == "cuda" or cpu_has_bfloat16(), use_cpu=device.type == "cpu", learning_rate=5e-4,
            save_strategy="no", report_to=[], logging_steps=args.steps, disable_tqdm=True),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    num_tokens = args.steps * args.batch_size * sum(lengths) / len(lengths)
    seconds = times[-1] - times[-1 - args.steps]
    speed, peak = num_tokens / seconds, peak_flops(device, torch.bfloat16)
    return {"tokens_per_s": speed, "mfu": speed * flops_per_token(model, length / 2) / peak,
            "memory_gb": peak_memory(device)}


def transformers_recipe(args: argparse.Namespace) -> dict:
    """Train transformers' decoder of the same shape on rows cut from one stream of tokens, compiled. → as above

    In half precision where the machine has it, with the fused AdamW. Documents see each other: it has no mask for them.
    """
    dataset, _, length = STAGES[args.stage]
    device = choose_device(args.device)
    data = dataset(args.data_path, ChatTokenizer(), length, packing=False)
    with tempfile.TemporaryDirectory() as folder:
        save_folder(MiniMindForCausalLM(model_config(args)), folder, ChatTokenizer())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    num_flops = flops_per_token(MiniMindForCausalLM(model_config(args)), length / 2)
    model.compile()
    optimizer, dtype = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True), training_dtype(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    row_tokens = args.batch_size * length
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            synchronise(device)
            start = time.perf_counter()
        first = step * row_tokens % (len(data.tokens) - row_tokens)
        ids = torch.from_numpy(data.tokens[first:first + row_tokens].astype(np.int64)).view(-1, length).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    synchronise(device)
    speed = args.steps * row_tokens / (time.perf_counter() - start)
    return {"tokens_per_s": speed, "mfu": speed * num_flops / peak_flops(device, dtype),
            "memory_gb": peak_memory(device)}


PEERS = {"trl": "sft", "transformers": "pretrain"}
RECIPES = {"plain": plain_recipe, "trl": trl_recipe, "transformers": transformers_recipe}


def default_flags(args: argparse.Namespace, folder: Path, num_steps: int, log_interval: int) -> dict:
    """Flags of the stage's own script, from random weights."""
    flags = {name: getattr(args, name) for name in ("data_path", "hidden_size", "num_hidden_layers", "use_moe",
                                                    "batch_size", "device")}
    flags |= {"from_weight": "none", "accumulation_steps": 1, "max_steps": num_steps, "log_interval": log_interval,
              "epochs": 1000, "use_compile": 1, "max_seq_len": STAGES[args.stage][2]}  # of the plain recipe's rows
    # a cache of its own for DPO, which would find an earlier run's log-probabilities of the reference in the common one
    return flags | ({"cache_dir": folder} if args.stage == "dpo" else {})


def default_recipe(args: argparse.Namespace, folder: Path) -> dict:
    """Run the stage's own script. → the numbers of its second log line, whose steps come after the warm-up

    DPO's include the pass of the reference over the file, as if it served one epoch only.
    """
    dataset, script, length = STAGES[args.stage]
    log, output = train([script], default_flags(args, folder, 2 * args.steps, args.steps), folder)
    row = log[-1]
    if args.stage == "dpo":  # a prompt that both answers share is computed and logged once, the plain recipe's twice
        data = dataset(args.data_path, ChatTokenizer(), length, cache_dir=folder)
        row["tokens_per_s"] *= (repeated := data.rows.length.sum() / data.num_tokens.sum())
    if reference := re.search(r"reference: ([\d,]+) tokens .* in ([\d.]+) s", output):
        num_tokens, seconds = (float(text.replace(",", "")) for text in reference.groups())
        row["training_tokens_per_s"] = row["tokens_per_s"]
        row["tokens_per_s"] = 1 / (1 / row["tokens_per_s"] + seconds / (num_tokens * repeated))
    return {key: row[key] for key in ("tokens_per_s", "training_tokens_per_s", "mfu", "memory_gb") if key in row}


def training_parser(description: str) -> Parser:
    """A parser with the flags of a stage that is trained for a few steps."""
    parser = model_parser(description)
    parser.add_argument("--stage", choices=STAGES, default="pretrain", help="row format and length")
    parser.add_argument("--data_path", type=Path, required=True, help="rows to train on")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows per step")
    parser.add_argument("--warmup", type=nonneg_int, default=1, help="steps that are not measured")
    parser.add_argument("--steps", type=positive_int, default=4, help="steps that are")
    return parser


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--peer", choices=PEERS, help="compare with this, too: " + ", ".join(
        f"{peer} with --stage {stage}" for peer, stage in PEERS.items()))
    parser.add_argument("--only", nargs=2, metavar=("RECIPE", "FILE"), help=argparse.SUPPRESS)  # writes its numbers
    args = parser.parse_args()
    if args.only:
        Path(args.only[1]).write_text(json.dumps(RECIPES[args.only[0]](args)))
        return
    if args.peer and args.stage != PEERS[args.peer]:
        parser.error(f"--peer {args.peer} trains --stage {PEERS[args.peer]}, not {args.stage}")
    name, numbers = result_name(f"train_speed_{args.stage}", args), {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in ("plain", *[args.peer] * bool(args.peer)):
            target = Path(folder) / f"{recipe}.json"
            subprocess.run([sys.executable, *sys.argv, "--only", recipe, target], check=True)
            numbers[recipe] = json.loads(target.read_text())
        numbers["default"] = default_recipe(args, Path(folder))
    speed = {recipe: values["tokens_per_s"] for recipe, values in numbers.items()}
    for recipe, values in numbers.items():
        print(f"{name} {recipe:8} {speed[recipe]:9,.0f} useful tokens/s  mfu {values['mfu']:4.0%}  "
              f"{values['memory_gb']:.1f} GB  default is {speed['default'] / speed[recipe]:.2f} times as fast")
    save_result(name, {**numbers, "ratio": speed["default"] / speed["plain"]})


if __name__ == "__main__":
    run_main(main)
