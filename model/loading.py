"""The model that a user names on the command line: flags, and from flags to a model and its tokenizer."""

import argparse
from pathlib import Path

from torch import nn

from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import SWITCH, positive_int
from model.device import choose_device, inference_dtype
from model.model_lora import load_lora, merge_lora
from model.transformers_io import load_folder
from model.weights import OUT_DIR, find_tokenizer, find_weight, read_metadata, read_weight


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Flags for the sizes of a model."""
    group = parser.add_argument_group("model (needed only to create one, or to choose between weights of one name)")
    group.add_argument("--hidden_size", type=positive_int, help="width (768 for a new model)")
    group.add_argument("--num_hidden_layers", type=positive_int, help="blocks (8 for a new model)")
    group.add_argument("--num_attention_heads", type=positive_int, help="query heads (8 for a new model)")
    group.add_argument("--num_key_value_heads", type=positive_int, help="key-value heads (4 for a new model)")
    group.add_argument("--intermediate_size", type=positive_int, help="width of the feed-forward (pi x hidden_size)")
    group.add_argument("--use_moe", **SWITCH, help="mixture of 4 experts instead of dense")
    group.add_argument("--norm_topk_prob", **SWITCH,
                       help="MoE: weights of the chosen experts sum to 1 (0 for a new model, 1 in the published ones)")


def add_folder_args(parser: argparse.ArgumentParser) -> None:
    """Flags for where weights and tokenizer are, and for the device."""
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="folder of the weights and logs")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, if it is not the one in model/")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the best available")


def add_loading_args(parser: argparse.ArgumentParser) -> None:
    """Flags that choose a model for inference; each program adds its own flag for the name of the weights."""
    parser.add_argument("--load_from", default="model", help="'model': from --save_dir; else a transformers folder")
    parser.add_argument("--lora_weight", help="name of a LoRA that was trained on the weight")
    add_folder_args(parser)
    parser.add_argument("--inference_rope_scaling", action="store_true", help="YaRN: longer texts than trained on")
    add_model_args(parser)


def load_from_args(args: argparse.Namespace, weight: str) -> tuple[nn.Module, ChatTokenizer]:
    """The model that the flags of `add_loading_args` describe, with the weights `weight`, and its tokenizer."""
    use_moe = None if args.use_moe is None else bool(args.use_moe)
    return load_for_inference(args.load_from, weight, args.save_dir, args.tokenizer, choose_device(args.device),
                              args.hidden_size, use_moe, args.inference_rope_scaling, args.lora_weight)


def load_for_inference(load_from: str, weight: str, save_dir: Path, tokenizer_dir: str | Path | None, device: str,
                       hidden_size: int | None = None, use_moe: bool | None = None,
                       inference_rope_scaling: bool = False,
                       lora_weight: str | None = None) -> tuple[nn.Module, ChatTokenizer]:
    """A frozen model in evaluation mode on `device`, in the dtype of `inference_dtype`, and its tokenizer.

    `load_from`: "model" for the weights `weight` of `save_dir`, anything else is a transformers folder.
    `tokenizer_dir`: None for the tokenizer that the weights' .json names, model/ where there is none.
    `lora_weight`: name of a LoRA in `save_dir`, merged into the weights. Raises UserError where something is missing.
    """
    if load_from != "model":
        yarn = {"inference_rope_scaling": True} if inference_rope_scaling else {}
        model, tokenizer = load_folder(load_from, **yarn)
    else:
        path = find_weight(weight, save_dir, hidden_size, use_moe)
        tokenizer_hash = read_metadata(path).get("tokenizer")
        if tokenizer_hash and not tokenizer_dir:
            tokenizer_dir = find_tokenizer(tokenizer_hash, path.parent)
        tokenizer = ChatTokenizer(tokenizer_dir or TOKENIZER_DIR)
        model, _ = read_weight(path, tokenizer, inference_rope_scaling)
    if lora_weight:
        load_lora(model, lora_weight, save_dir)
        merge_lora(model)
    dtype = inference_dtype(device, getattr(model.config, "use_moe", False))
    return model.to(device, dtype).eval().requires_grad_(False), tokenizer
