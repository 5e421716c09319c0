"""Folders in transformers' format: read Qwen3 and Qwen3-MoE, write our models as these or as our own class."""

import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from model import attention, linear, model_minimind, moe
from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import UserError, first_line
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import CONFIG_KEYS

AUTO_MAP = {"AutoConfig": "model_minimind.MiniMindConfig", "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"}


def qwen3_config(config: MiniMindConfig, **options) -> PretrainedConfig:
    """Our configuration as that of transformers' Qwen3 or Qwen3-MoE, whose parameters have the same names."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    omitted = {"model_type", "architectures", "auto_map", "use_moe", "inference_rope_scaling"}
    if not config.use_moe:  # engines take every model whose config names experts for a MoE
        omitted |= {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
                    "router_aux_loss_coef"}
    values = {name: value for name, value in config.to_dict().items() if name not in omitted}
    if config.use_moe:  # SGLang reads the LM head of a Qwen3-MoE from its own weights
        values["tie_word_embeddings"] = False
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return (Qwen3MoeConfig if config.use_moe else Qwen3Config)(**values | options, rope_parameters=rope)


def minimind_config(config: PretrainedConfig) -> MiniMindConfig:
    """The configuration of a Qwen3 or Qwen3-MoE as ours. Raises UserError for what our decoder cannot express."""
    rope = getattr(config, "rope_parameters", None) or {}
    supported = {"model_type": ("qwen3", "qwen3_moe"), "hidden_act": ("silu",), "attention_bias": (False,),
                 "use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
    unsupported = [f"{name} {getattr(config, name)}" for name, values in supported.items()
                   if getattr(config, name, values[0]) not in values]
    if not unsupported and rope.get("rope_type", "default") != "default":
        unsupported = [f"rope_type {rope['rope_type']}"]
    if unsupported:
        raise UserError(f"MiniMind has no such model: {', '.join(unsupported)}; it reads Qwen3 and Qwen3-MoE as "
                        "published")
    values = {name: getattr(config, name) for name in CONFIG_KEYS if hasattr(config, name)}
    return MiniMindConfig(**values | {"use_moe": config.model_type == "qwen3_moe", "rope_theta": rope["rope_theta"]})


def from_hf_model(model: nn.Module) -> MiniMindForCausalLM:
    """A Qwen3 or Qwen3-MoE of transformers as our class; a model of our class as it is."""
    if isinstance(model, MiniMindForCausalLM):
        return model
    config, state = minimind_config(model.config), model.state_dict()
    config.tie_word_embeddings = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    ours = MiniMindForCausalLM(config)
    ours.load_state_dict(state)
    return ours


def chat_template(tokenizer: ChatTokenizer) -> str:
    """The jinja template in the tokenizer's folder; the one that renders as model/chat.py where there is none."""
    path, settings = tokenizer.folder / "chat_template.jinja", tokenizer.folder / "tokenizer_config.json"
    if not path.is_file() and settings.is_file():
        template = json.loads(settings.read_text("utf-8")).get("chat_template")
        if isinstance(template, str):
            return template
    return (path if path.is_file() else TOKENIZER_DIR / path.name).read_text("utf-8")


def save_folder(model: nn.Module, folder: str | Path, tokenizer: ChatTokenizer, kind: str = "CausalLM",
                dtype: torch.dtype = torch.float32, as_minimind: bool = False, **options) -> None:
    """Write `model` as a Qwen3 folder with its tokenizer, for transformers' AutoModelFor{kind}.

    With `as_minimind`, as MiniMind's class: its file goes along, for programs that load with trust_remote_code.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    if as_minimind:
        moe.register_expert_names()
        exported = MiniMindForCausalLM(MiniMindConfig(**model.config.to_dict() | {"auto_map": AUTO_MAP}))
    else:
        class_name = f"{'Qwen3Moe' if model.config.use_moe else 'Qwen3'}For{kind}"
        exported = getattr(transformers, class_name)(qwen3_config(model.config, **options))
    exported.load_state_dict(model.state_dict())
    exported.to(dtype).save_pretrained(folder)
    if as_minimind:
        for module in (model_minimind, attention, linear, moe):  # imported relatively, so transformers finds them
            shutil.copy(module.__file__, folder)
    else:  # transformers 5 renamed these; engines and transformers 4 read the old names, and have defaults for them
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config |= {"rope_theta": model.config.rope_theta, "torch_dtype": config["dtype"]}
        config |= {"num_experts": model.config.num_experts} if model.config.use_moe else {}
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = tokenizer.folder / name
        shutil.copyfile(source if source.is_file() else TOKENIZER_DIR / name, folder / name)
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer), "utf-8")


def register() -> None:
    """Let transformers' AutoConfig and AutoModelForCausalLM open folders of MiniMind's class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)


def load_folder(folder: str | Path, flag: str = "--load_from", **overrides) -> tuple[nn.Module, ChatTokenizer]:
    """A model and its tokenizer from a folder in transformers' format (Qwen3, or MiniMind's class); no remote code."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (Path(folder) / "config.json").is_file():
        hint = ", nor the word 'model'" if flag == "--load_from" else ""
        raise UserError(f"{flag} {folder}: not a transformers folder (no config.json){hint}")
    register()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                                             trust_remote_code=False, **overrides)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {folder}: {first_line(error)}") from None
    if missing := sorted(loaded["missing_keys"]):  # transformers would leave them random, behind a warning
        raise UserError(f"{flag} {folder}: its weights lack {missing[0]} and {len(missing) - 1} others")
    return model, ChatTokenizer(folder)
