"""Turn weights into what other programs read, and back; every conversion is checked before it gets its name.

    python scripts/convert_model.py --source out/full_sft_768.pth --target out/full_sft_hf --format transformers
    python scripts/convert_model.py --source out/full_sft_768.pth --target out/full_sft.gguf --format gguf --dtype q8_0
    python scripts/convert_model.py --source FOLDER --target out/downloaded_768.pth --format torch
    python scripts/convert_model.py --source out/full_sft_768.pth --lora out/lora_a_768.pth out/lora_b_768.pth=0.5 \\
                                    --target out/full_sft_ab_768.pth --format torch
    python scripts/convert_model.py --source out/lora_a_768.pth --target out/lora_a_peft --format peft
    python scripts/convert_model.py --source out/full_sft_768.pth --lora PEFT_FOLDER \\
                                    --target out/lora_c_768.pth --format lora

A source is a .pth of ours, with or without its .json, or a transformers folder (Qwen3, Qwen3-MoE, MiniMind's class).
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.chat import ChatTokenizer
from model.cli import Failure, Parser, UserError, first_line, run_main
from model.files import write_atomically
from model.loading import load_native
from model.model_lora import (
    LoRAConfig,
    find_target_modules,
    load_adapter_file,
    load_adapter_state,
    lora_state,
    merge_lora,
    read_lora,
    save_lora,
)
from model.model_minimind import MiniMindForCausalLM
from model.moe import Experts
from model.transformers_io import from_hf_model, load_folder, save_folder
from model.weights import OUT_DIR, ROOT, file_stem, read_weight, save_weight, weight_name, weights_hash

FORMATS = {"transformers": "a folder of Qwen3 or Qwen3-MoE", "minimind": "a folder of MiniMind's own class",
           "torch": "a .pth of ours", "gguf": "a file for llama.cpp, with Ollama's Modelfile",
           "lora": "a .pth of the LoRA named by --lora", "peft": "an adapter folder; then --source is a LoRA of ours"}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": None, "q4_0": None}
SAMPLE = [{"role": "system", "content": "You answer briefly. 请简短回答。"},
          {"role": "user", "content": "中国的首都是哪里？ What is 12 × 34?  🙂\n```\nfor i in x:\n\tprint(i)\n```"},
          {"role": "assistant", "reasoning_content": "北京; 12 × 34 = 408.", "content": "北京，408。"}]


def read_source(path: Path, tokenizer_dir: Path | None) -> tuple[nn.Module, ChatTokenizer, dict]:
    """The model and tokenizer that --source names, and the metadata of a .pth."""
    if path.is_dir():
        if tokenizer_dir:
            raise UserError(f"--tokenizer {tokenizer_dir}: {path} has its own tokenizer; leave the flag out")
        return *load_folder(path, "--source"), {}
    if not path.is_file():
        raise UserError(f"--source {path}: there is no such file or folder")
    return load_native(path, tokenizer_dir)


def attach(model: nn.Module, text: str, base: str | None = None) -> tuple[LoRAConfig, float]:
    """Attach a LoRA of ours or a peft adapter, "PATH" or "PATH=WEIGHT", in place. → the LoRA and its weight"""
    name, _, number = text.rpartition("=") if "=" in text else (text, "", "1")
    try:
        path, weight = Path(name), float(number)
    except ValueError:
        raise UserError(f"--lora {text}: {number} is not a number; write PATH or PATH=WEIGHT") from None
    return (import_peft(model, path) if path.is_dir() else load_adapter_file(model, path, base)), weight


@torch.no_grad()
def logits(model: nn.Module, ids: list[int]) -> Tensor:
    return model.eval()(torch.tensor([ids])).logits[0]


def round_to(dtype: str, name: str, value: Tensor, output_format: str) -> Tensor:
    """A parameter rounded to `dtype`, in fp32. GGUF keeps norms and routers as they are.

    In a block of 32 weights, each is an integer times the block's scale: from -127 to 127 in q8_0, and from -8 to 7 in
    q4_0, whose scale makes the largest weight -8.
    """
    if output_format == "gguf" and (value.dim() == 1 or name.endswith("mlp.gate.weight")):
        return value
    if DTYPES[dtype]:
        return value.to(DTYPES[dtype]).float()
    if value.shape[-1] % 32:
        return value.half().float()
    blocks = value.reshape(-1, 32)
    if dtype == "q8_0" or name in ("model.embed_tokens.weight", "lm_head.weight"):
        scale = blocks.abs().amax(1, keepdim=True) / 127
        scaled = torch.where(scale > 0, blocks * (1 / scale), 0)
        integers = scaled.sign() * (scaled.abs() + 0.5).floor()
    else:
        scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
        scaled = torch.where(scale != 0, blocks * (1 / scale), 0)
        integers = (scaled + 8.5).floor().clamp(0, 15) - 8
    return (integers * scale.half().float()).view_as(value)


def convert(model: MiniMindForCausalLM, tokenizer: ChatTokenizer, target: Path, output_format: str, dtype: str,
            metadata: dict) -> nn.Module:
    """Write `model` to `target` and read it back. → what was read"""
    if output_format == "torch":
        save_weight(model, weight_name(target), target.parent, tokenizer, **metadata)
        return read_weight(target, tokenizer)[0]
    if output_format == "gguf":
        from scripts.lib import gguf_file  # PyPI's gguf is needed for nothing else

        gguf_file.write_gguf(model, target, tokenizer, dtype)
        if not tokenizer.own_template:  # Ollama's template language is another
            num_ctx = min(8192, model.config.max_position_embeddings)
            write_atomically(target.with_suffix(".Modelfile"), gguf_file.modelfile(target.name, num_ctx))
        return gguf_file.read_gguf(target, model.config)
    save_folder(model, target, tokenizer, dtype=DTYPES[dtype], as_minimind=output_format == "minimind")
    return load_folder(target)[0]


def check(name: Path, dtype: str, source: Tensor, rounded: Tensor, written: Tensor) -> str:
    """Compare logits of the source, of the source rounded to `dtype`, and of what was written. → the result, in words

    Raises UserError when the dtype cannot hold the weights, Failure when rounding does not explain the difference.
    """
    if source.isfinite().all() and not rounded.isfinite().all():
        raise UserError(f"--dtype {dtype} cannot hold these weights; name another")
    error, tolerance = (written - rounded).abs().max().item(), 1e-4 * max(1, rounded.abs().max().item())
    if not error <= tolerance:
        raise Failure(f"{name} was not written: its logits are {error:.2g} from those of the source in {dtype}, "
                      f"more than the {tolerance:.2g} that rounding explains")
    difference = (written - source).abs().max().item()
    return f"{dtype}; logits of {len(written)} tokens are within {difference:.2g} of the source's"


def peft_name(name: str, stacks: list[str]) -> str:
    """Our name of a LoRA tensor → peft's, which wraps one stack of experts around the other, gate_up_proj inside."""
    path, _, letter = name.partition(".lora_")
    letter, _, stack = letter.partition(".")
    inner = ".base_layer" if stack == "gate_up_proj" and "down_proj" in stacks else ""
    return f"base_model.model.{path}{inner}.lora_{letter}.weight"


def to_peft_layout(name: str, value: Tensor) -> Tensor:
    """A stack of A [E, rank, in] as [E·rank, in], of B [E, out, rank] as [out, rank·E]; matrices as they are."""
    if value.dim() == 3:
        value = value.flatten(0, 1) if ".lora_A." in name else value.permute(1, 2, 0).flatten(1)
    return value.float().contiguous()


def from_peft_layout(name: str, value: Tensor, rank: int) -> Tensor:
    if ".lora_A." in name:
        return value.unflatten(0, (-1, rank))
    return value.unflatten(1, (rank, -1)).permute(2, 0, 1) if ".lora_B." in name else value


def export_peft(path: Path, folder: Path) -> str:
    """A LoRA file → an adapter folder that `peft.PeftModel.from_pretrained` attaches to its base."""
    lora, state = read_lora(path)
    stacks = sorted({name.partition(".lora_A.")[2] for name in state} - {""})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none",
              "lora_dropout": 0.0 if stacks else lora.dropout, "inference_mode": True,
              "target_modules": [name for name in lora.targets if name not in stacks],
              "target_parameters": [f"mlp.experts.{name}" for name in stacks] or None}
    folder.mkdir()
    file = folder / "adapter_model.safetensors"
    save_file({peft_name(name, stacks): to_peft_layout(name, value) for name, value in state.items()}, file)
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=1))
    shutil.copymode(folder / "adapter_config.json", file)  # safetensors lets nobody else read it
    written = load_file(file)
    if not all(torch.equal(from_peft_layout(name, written[peft_name(name, stacks)], lora.rank), value.float())
               for name, value in state.items()):
        raise Failure(f"{folder.name} was not written: it does not read back as {path}")
    return f"{len(state)} tensors, read back equal"


def import_peft(model: nn.Module, folder: Path) -> LoRAConfig:
    """Attach the adapter of a peft folder to `model`, in place. Raises UserError for what LoRA here cannot do."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except Exception as error:
        raise UserError(f"--lora {folder}: not a peft adapter folder: {first_line(error)}") from None
    unsupported = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
                                   "alora_invocation_tokens") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise UserError(f"--lora {folder}: plain LoRA of one rank can be read, not one with "
                        f"{', '.join(unsupported) or config.get('peft_type')}")
    if (init := config.get("init_lora_weights")) not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(f"--lora {folder}: {init} changes the base model, which is not in the folder; save it as plain "
                        "LoRA with save_pretrained(…, path_initial_model_for_weight_conversion=…) of peft")
    if config.get("use_rslora"):  # alpha / sqrt(rank) instead of alpha / rank
        alpha *= math.sqrt(rank)
    stacks = [name.rsplit(".", 1)[1] for name in config.get("target_parameters") or ()]
    state, targets = {}, []
    for target, layers in find_target_modules(model).items():
        for path, layer in layers:
            stack = f".{target}" if isinstance(layer, Experts) else ""
            for name in (f"{path}.lora_A{stack}", f"{path}.lora_B{stack}"):
                if (peft_key := peft_name(name, stacks)) in tensors and (not stack or target in stacks):
                    state[name] = from_peft_layout(name, tensors.pop(peft_key), rank)
                    targets += [target] * (target not in targets)
    if tensors:
        raise UserError(f"--lora {folder}: this model has no module for {min(tensors)}; name its base with --source")
    lora = LoRAConfig(rank, alpha, float(config.get("lora_dropout") or 0), tuple(targets), weights_hash(model))
    load_adapter_state(model, lora, state, folder)
    return lora


def write(args: argparse.Namespace, draft: Path) -> str:
    """Convert --source to `draft`, and check. → the result, in words"""
    if args.format == "peft":
        return export_peft(args.source, draft)
    source, tokenizer, metadata = read_source(args.source, args.tokenizer)
    ids = tokenizer.encode(SAMPLE)[0]
    model, source_logits = from_hf_model(source), logits(source, ids)
    if args.format in ("torch", "lora") and draft.name != f"{file_stem(weight_name(draft), model.config)}.pth":
        stem = file_stem("NAME", model.config)
        raise UserError(f"--target {args.target}: a weight of this size is called {stem}.pth")
    metadata = {"parent": weight_name(args.source), "tokens_seen": metadata.get("tokens_seen", 0)}
    if args.format == "lora":
        base, (lora, weight) = copy.deepcopy(model), attach(model, args.lora[0])
        if weight != 1:
            raise UserError(f"--lora {args.lora[0]}: --format lora writes it as it is; leave ={weight:g} out")
        source_logits = logits(model, ids)
        save_lora(model, weight_name(draft), draft.parent, tokenizer, lora, **metadata)
        for value in lora_state(model).values():
            value.data = value.half().float()
        load_adapter_file(base, draft)
        return check(args.target, args.dtype, source_logits, logits(model, ids), logits(base, ids))
    base = weights_hash(model) if args.lora else ""
    for text in args.lora:
        merge_lora(model, attach(model, text, base)[1])
    if args.lora:
        source_logits, metadata = logits(model, ids), metadata | {"merged": args.lora}
    written = convert(model, tokenizer, draft, args.format, args.dtype, metadata)
    for name, value in model.named_parameters():
        value.data = round_to(args.dtype, name, value.data, args.format)
    result = check(args.target, args.dtype, source_logits, logits(model, ids), logits(written, ids))
    if args.format == "gguf" and tokenizer.own_template:
        result += "; without a Modelfile: Ollama needs the chat template in its own language"
    if args.format == "torch" and tokenizer.hash != ChatTokenizer().hash:
        result += f"; its tokenizer is --tokenizer {tokenizer.folder}"
    return result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=OUT_DIR / "full_sft_768.pth",
                        help="weight (.pth) or transformers folder to convert (default: out/full_sft_768.pth)")
    parser.add_argument("--target", type=Path, help="file or folder to write (default: minimind-3, a folder)")
    parser.add_argument("--format", choices=FORMATS, default="transformers",
                        help="default: %(default)s. " + "; ".join(f"{name}: {text}" for name, text in FORMATS.items()))
    parser.add_argument("--lora", nargs="+", default=[], metavar="PATH[=WEIGHT]",
                        help="LoRAs (.pth) or peft adapters (folders) of the source, to merge into it")
    parser.add_argument("--dtype", choices=DTYPES, default="f16", help="precision of the target (default: f16)")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer of a .pth, if its .json names none")
    args = parser.parse_args(argv)
    if args.target is None and args.format not in ("transformers", "minimind"):
        raise UserError(f"--format {args.format} writes no folder like minimind-3; name the --target")
    args.target = args.target or ROOT / "minimind-3"
    if args.target.exists():
        raise UserError(f"--target {args.target}: it is already there; remove it or name another")
    beside = {"gguf": [".Modelfile"], "torch": [".json"], "lora": [".json"]}.get(args.format, [])
    for path in map(args.target.with_suffix, beside):
        if path.exists():
            raise UserError(f"--target {args.target}: {path} is already there; remove it or name another")
    if args.dtype != "f16" and args.format in ("torch", "lora"):
        raise UserError(f"--dtype {args.dtype}: a .pth holds f16; leave the flag out")
    if DTYPES[args.dtype] is None and args.format != "gguf":
        raise UserError(f"--dtype {args.dtype} is of --format gguf, not of {args.format}")
    if args.format == "lora" and len(args.lora) != 1:
        raise UserError("--format lora writes one adapter: name it with --lora")
    if args.format == "peft" and args.lora:
        raise UserError("--format peft writes the LoRA that --source names; leave --lora out")
    if args.format == "peft":
        parser.note_unused(args, ("dtype", "tokenizer"), "with other formats: an adapter is fp32, without a tokenizer")
    return args


def main() -> None:
    args = parse_args()
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=args.target.parent) as folder:
        draft = Path(folder) / args.target.name
        result = write(args, draft)
        for path in Path(folder).rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        for path in sorted(Path(folder).iterdir()):  # the .json before the .pth
            path.replace(args.target.parent / path.name)
    print(f"{args.source} → {args.target} ({args.format}, {result})")


if __name__ == "__main__":
    run_main(main)
