"""The model that a user names on the command line: flags, and from flags to a model and its tokenizer."""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import SWITCH, Parser, UserError, boolean, optional_name, whole_number
from model.device import choose_device, inference_dtype
from model.model_lora import load_lora, merge_lora
from model.transformers_io import from_hf_model, load_folder, open_tokenizer
from model.weights import OUT_DIR, check_tokenizer, find_weight, read_weight, tokenizer_of, weight_name

MODEL_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
               "intermediate_size", "use_moe", "num_experts", "num_experts_per_tok", "n_shared_experts",
               "norm_topk_prob")


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Flags for the sizes of a model."""
    group = parser.add_argument_group("model (needed only to create one, or to choose between weights of one name)")
    count, width = whole_number(1, 1024), whole_number(1, 2**20)
    group.add_argument("--hidden_size", type=width, help="width (768 for a new model)")
    group.add_argument("--num_hidden_layers", type=count, help="blocks (8 for a new model)")
    group.add_argument("--num_attention_heads", type=count, help="query heads (8 for a new model)")
    group.add_argument("--num_key_value_heads", type=count, help="key-value heads (4 for a new model)")
    group.add_argument("--intermediate_size", type=width, help="width of the feed-forward (pi x hidden_size)")
    group.add_argument("--use_moe", **SWITCH, help="1: mixture of experts (4 by default)")
    group.add_argument("--num_experts", "--n_routed_experts", type=count,
                       help="MoE: experts (4 for a new model)")
    group.add_argument("--num_experts_per_tok", type=count, help="MoE: experts per token (1 for a new model)")
    group.add_argument("--n_shared_experts", type=whole_number(0, 1024),
                       help="MoE: shared experts, which process every token (0 for a new model)")
    group.add_argument("--norm_topk_prob", **SWITCH,
                       help="MoE: weights of the chosen experts sum to 1 (0 for a new model, 1 in the published ones)")


def add_folder_args(parser: argparse.ArgumentParser) -> None:
    """Flags for where weights and tokenizer are, and for the device."""
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="folder of the weights and logs")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, if the weight's .json names none")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the best available")


def add_loading_args(parser: Parser) -> None:
    """Flags that choose a model for inference; each program adds its own flag for the name of the weights."""
    parser.add_argument("--load_from", default="model", help="'model': from --save_dir; a folder with only a "
                        "tokenizer: from --save_dir, with this tokenizer; else a transformers folder")
    parser.add_argument("--lora_weight", type=optional_name, help="name of a LoRA that was trained on the weights")
    add_folder_args(parser)
    parser.add_argument("--inference_rope_scaling", type=boolean, nargs="?", const=True, default=False,
                        help="YaRN: extend the context beyond the trained length")
    add_model_args(parser)
    parser.add_aliases(lora_name="lora_weight", out_dir="save_dir")


def load_from_args(args: argparse.Namespace, weight: str,
                   dtype: torch.dtype | None = None) -> tuple[nn.Module, ChatTokenizer]:
    """The model that the flags of `add_loading_args` describe, with the weights `weight`, and its tokenizer.

    `dtype`: as of `load_for_inference`.
    """
    if args.tokenizer and not is_native(args.load_from):
        raise UserError(f"--tokenizer {args.tokenizer}: {args.load_from} has its own tokenizer; leave the flag out")
    use_moe = None if args.use_moe is None else bool(args.use_moe)
    model, tokenizer = load_for_inference(
        args.load_from, weight, args.save_dir, args.tokenizer, choose_device(args.device), args.hidden_size, use_moe,
        args.inference_rope_scaling, args.lora_weight, dtype)
    check_sizes(args, model.config, f"weight {weight}" if is_native(args.load_from) else args.load_from)
    return model, tokenizer


def check_sizes(args: argparse.Namespace, config: PretrainedConfig, source: str) -> None:
    """Raise UserError for a flag of `add_model_args` that disagrees with the configuration of what `source` names."""
    for name in MODEL_SIZES:
        actual = getattr(config, name, "moe" in config.model_type if name == "use_moe" else None)
        if (value := getattr(args, name)) not in (None, actual):
            raise UserError(f"--{name} {int(value)}, but {source} has {int(actual) if actual is not None else 'none'}; "
                            "leave the flag out, or name another weight")


def is_native(load_from: str) -> bool:
    """Whether `--load_from` means a weight of --save_dir: model/ of this project, or a folder with only a tokenizer."""
    folder = Path(load_from).expanduser()
    return is_ours(load_from) or (folder / "tokenizer.json").is_file() and not (folder / "config.json").exists()


def is_ours(folder: str | Path) -> bool:
    """Whether `folder` means model/ of this project: the word itself, its path, or ../model from anywhere."""
    path = Path(folder).expanduser()
    names = (Path("model"), Path("../model"))
    return str(folder) == "model" or path.resolve() == TOKENIZER_DIR or path in names and not path.exists()


def continues_text(load_from: str, weight: str) -> bool:
    """Whether a model continues text and does not chat: a native weight called 'pretrain…'."""
    return is_native(load_from) and weight_name(weight).startswith("pretrain")


def load_native(path: Path, tokenizer_dir: str | Path | None = None,
                inference_rope_scaling: bool = False) -> tuple[nn.Module, ChatTokenizer, dict]:
    """The model of a .pth, its tokenizer and its metadata.

    A weight that was not trained here (there is no .json, or it says so) is prompted by its tokenizer's own template.
    """
    model, metadata = read_weight(path, inference_rope_scaling=inference_rope_scaling)
    tokenizer = open_tokenizer(tokenizer_of(path, tokenizer_dir), metadata.get("own_template", not metadata))
    check_tokenizer(path, metadata, tokenizer, model.config.vocab_size)
    return model, tokenizer, metadata


def load_for_inference(load_from: str, weight: str, save_dir: Path, tokenizer_dir: str | Path | None, device: str,
                       hidden_size: int | None = None, use_moe: bool | None = None,
                       inference_rope_scaling: bool = False,
                       lora_weight: str | None = None,
                       dtype: torch.dtype | None = None) -> tuple[nn.Module, ChatTokenizer]:
    """A frozen model in evaluation mode on `device`, in `dtype` (None: that of `inference_dtype`), and its tokenizer.

    `load_from`: "model", or a folder with a tokenizer and no model, for the weights `weight` of `save_dir`; anything
    else is a transformers folder. `tokenizer_dir`: None for the tokenizer that `load_from` or the weights' .json names.
    `lora_weight`: name of a LoRA in `save_dir`, merged into the weights. Raises UserError where something is missing.
    """
    if is_native(load_from):
        if not is_ours(load_from):
            tokenizer_dir = tokenizer_dir or Path(load_from).expanduser()
        path = find_weight(weight, save_dir, hidden_size, use_moe)
        model, tokenizer, _ = load_native(path, tokenizer_dir, inference_rope_scaling)
    else:
        model, tokenizer = load_folder(load_from)
        if inference_rope_scaling:  # our decoder computes it
            model = from_hf_model(model)
            model.config.inference_rope_scaling = True
    if lora_weight:
        load_lora(model, lora_weight, save_dir)
        merge_lora(model)
    dtype = dtype or inference_dtype(device, getattr(model.config, "use_moe", False))
    for parameter in model.parameters():  # not the buffers: transformers keeps its rotary frequencies in one, in fp32
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False), tokenizer
