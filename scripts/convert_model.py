"""Turn weights into what other programs read, and back: transformers folders, peft adapters, merged LoRAs.

    python scripts/convert_model.py --weight full_sft --to_transformers out/full_sft_folder
    python scripts/convert_model.py --weight full_sft --merge lora_a lora_b=0.5 --save_weight full_sft_ab
    python scripts/convert_model.py --lora_name lora_identity --to_peft out/lora_identity_peft
    python scripts/convert_model.py --weight full_sft --from_peft DIR --lora_name lora_identity
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.errors import UserError, first_line, run_main
from model.model_lora import LoRA, adaptable, attach_lora, load_lora, merge_lora, read_lora, save_lora
from model.model_minimind import Experts
from model.weights import OUT_DIR, find_weight, fingerprint, load_weight, save_atomically, save_folder, save_weight
from trainer.arguments import Parser, model_flags


def merge(model: nn.Module, wanted: list[str], save_dir: Path) -> None:
    """Add LoRAs, each "name" or "name=weight", to the model they were all trained on, in place."""
    base = fingerprint(model)
    for text in wanted:
        name, _, weight = text.partition("=")
        try:
            share = float(weight or 1)
        except ValueError:
            raise UserError(f"--merge {text}: {weight} is not a number; write name or name=weight") from None
        load_lora(model, name, save_dir, base)
        merge_lora(model, share)


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


def export_peft(path: Path, folder: Path) -> None:
    """A LoRA file → an adapter folder that `peft.PeftModel.from_pretrained` attaches to its base."""
    lora, state = read_lora(path)
    stacks = sorted({name.partition(".lora_A.")[2] for name in state} - {""})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha, "bias": "none",
              "lora_dropout": 0.0 if stacks else lora.dropout, "inference_mode": True,
              "target_modules": [name for name in lora.targets if name not in stacks],
              "target_parameters": [f"mlp.experts.{name}" for name in stacks] or None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({peft_name(name, stacks): to_peft_layout(name, value) for name, value in state.items()},
              folder / "adapter_model.safetensors")
    save_atomically(json.dumps(config, indent=1), folder / "adapter_config.json")


def import_peft(model: nn.Module, folder: Path) -> LoRA:
    """Attach the adapter of a peft folder to `model`, in place. Raises UserError for what LoRA here cannot do."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except Exception as error:
        raise UserError(f"--from_peft {folder}: not a peft adapter folder: {first_line(error)}") from None
    refused = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or refused:
        raise UserError(f"--from_peft {folder}: plain LoRA of one rank can be read, not one with "
                        f"{', '.join(refused) or config.get('peft_type')}")
    if config.get("use_rslora"):  # alpha / sqrt(rank) instead of alpha / rank
        alpha *= math.sqrt(rank)
    stacks = [name.rsplit(".", 1)[1] for name in config.get("target_parameters") or ()]
    state, targets = {}, []
    for target, layers in adaptable(model).items():
        for path, layer in layers:
            stack = f".{target}" if isinstance(layer, Experts) else ""
            for name in (f"{path}.lora_A{stack}", f"{path}.lora_B{stack}"):
                if (theirs := peft_name(name, stacks)) in tensors and (not stack or target in stacks):
                    state[name] = from_peft_layout(name, tensors.pop(theirs), rank)
                    targets += [target] * (target not in targets)
    if tensors:
        raise UserError(f"--from_peft {folder}: this model has no place for {min(tensors)}; name its base by --weight")
    lora = LoRA(rank, alpha, float(config.get("lora_dropout") or 0), tuple(targets), fingerprint(model))
    attach_lora(model, lora, state, folder)
    return lora


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--to_transformers", type=Path, metavar="DIR", help="write --weight as a Qwen3 folder")
    action.add_argument("--merge", nargs="+", metavar="LORA[=WEIGHT]", help="add LoRAs to --weight, as --save_weight")
    action.add_argument("--to_peft", type=Path, metavar="DIR", help="write --lora_name as a peft adapter folder")
    action.add_argument("--from_peft", type=Path, metavar="DIR", help="read a peft adapter of --weight as --lora_name")
    parser.add_argument("--weight", default="full_sft", help="name of the weight, the base of the LoRAs")
    parser.add_argument("--lora_name", default="lora_identity", help="name of the LoRA to write or to read")
    parser.add_argument("--save_weight", default="merged", help="name of the merged weight")
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="folder of the weights")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER_DIR, help="folder of the tokenizer")
    model_flags(parser)
    args = parser.parse_args()
    use_moe = None if args.use_moe is None else bool(args.use_moe)
    if args.to_peft:
        path = find_weight(args.lora_name, args.save_dir, args.hidden_size, use_moe)
        export_peft(path, args.to_peft)
        print(f"{path} → {args.to_peft}")
        return
    tokenizer = ChatTokenizer(args.tokenizer)
    model, card = load_weight(args.weight, args.save_dir, args.hidden_size, use_moe, tokenizer)
    if args.to_transformers:
        save_folder(model, args.to_transformers, tokenizer)
        target = args.to_transformers
    elif args.merge:
        merge(model, args.merge, args.save_dir)
        facts = {"parent": args.weight, "merged": args.merge, "tokens_seen": card.get("tokens_seen", 0)}
        target = save_weight(model, args.save_weight, args.save_dir, tokenizer, **facts)
    else:
        lora = import_peft(model, args.from_peft)
        target = save_lora(model, args.lora_name, args.save_dir, tokenizer, lora, parent=args.weight)
    print(f"{args.weight} → {target}")


if __name__ == "__main__":
    run_main(main)
