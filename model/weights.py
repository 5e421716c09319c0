"""Find, load and save weights: the only place that knows `out/`.

A weight is `{name}_{hidden_size}[_moe].pth`, a plain half-precision state dict, and a `.json` beside it with the
model's configuration, its tokenizer's hash, its parent and what it cost. Folders in transformers' format are read too.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from model import attention, linear, model_minimind, moe
from model.chat import TOKENIZER_DIR, ChatTokenizer, hash_tokenizer
from model.cli import UserError, first_line
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, register

ROOT = Path(__file__).resolve().parents[1]
OUT_DIR, CHECKPOINT_DIR = ROOT / "out", ROOT / "checkpoints"
CONFIG_KEYS = ("hidden_size", "num_hidden_layers", "use_moe", "vocab_size", "num_attention_heads",
               "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps",
               "rope_theta", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
               "router_aux_loss_coef", "tie_word_embeddings")

AUTO_MAP = {"AutoConfig": "model_minimind.MiniMindConfig", "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"}


def file_stem(name: str, config: MiniMindConfig) -> str:
    """`{name}_{hidden_size}[_moe]`, the name that weights, resume states and logs share."""
    return f"{name}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


def weight_name(path: Path) -> str:
    """What a weight is called without its sizes: full_sft for out/full_sft_768_moe.pth."""
    return re.sub(r"_\d+(_moe)?$", "", path.stem)


def save_atomically(value: object, path: Path) -> None:
    """Write text, or torch.save, to a file beside `path`, sync, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(value, str):
                file.write(value.encode())
            else:
                torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else first_line(error)
        raise OSError(None, f"{path}: not saved: {reason}; what was saved before is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_weight(model: nn.Module, name: str, save_dir: Path, tokenizer: ChatTokenizer, state: dict | None = None,
                **facts) -> Path:
    """Write `model`, or what of it is in `state`, as half precision with its .json (config, tokenizer, `facts`).

    → the path of the .pth.
    """
    path = Path(save_dir) / f"{file_stem(name, model.config)}.pth"
    state = model.state_dict() if state is None else state
    save_atomically({key: value.detach().half().cpu() if torch.is_tensor(value) else value
                     for key, value in state.items()}, path)
    card = {"config": {key: getattr(model.config, key, None) for key in CONFIG_KEYS}, "tokenizer": tokenizer.hash,
            **facts}
    save_atomically(json.dumps(card, indent=1, ensure_ascii=False), path.with_suffix(".json"))
    return path


def weights_hash(model: nn.Module) -> str:
    """Hash of a model's parameters as they would be saved: equal for equal weights, on any device, in any format."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().half().cpu().contiguous().numpy())
    return digest.hexdigest()


def find_weight(name: str, save_dir: Path, hidden_size: int | None = None, use_moe: bool | None = None) -> Path:
    """The .pth of weight `name`. Raises UserError when there is none, or several and nothing says which."""
    found = [path for path in sorted(Path(save_dir).glob(f"{name}_*.pth"))
             if (end := path.stem[len(name) + 1:].removesuffix("_moe")).isdigit()
             and hidden_size in (None, int(end)) and use_moe in (None, path.stem.endswith("_moe"))]
    if not found:
        wanted = f"{name}_{hidden_size or '*'}{'_moe' if use_moe else ''}.pth"
        there = ", ".join(path.stem for path in sorted(Path(save_dir).glob("*.pth"))) or "nothing"
        raise UserError(f"no weight {wanted} in {save_dir} (there: {there}); train it first or name another")
    if len(found) > 1:
        stems = ", ".join(path.stem for path in found)
        raise UserError(f"several weights fit {name!r} in {save_dir}: {stems}; choose with --hidden_size and --use_moe")
    return found[0]


def find_models(save_dir: Path = OUT_DIR, folders_in: Path = ROOT) -> dict[str, dict]:
    """Everything to talk to: what it is called → the arguments of `load_for_inference` that load it.

    Weights of `save_dir` (no LoRA, no reward model) and transformers folders in it or in `folders_in`; those that only
    continue text come last, and the newest first.
    """
    found = {}
    for path in Path(save_dir).glob("*.pth"):
        match = re.fullmatch(r"(?!lora_|reward)(.+)_(\d+)(_moe)?", path.stem)
        if match:
            name, size, moe = match.groups()
            found[path.stem] = path, {"load_from": "model", "weight": name, "save_dir": Path(save_dir),
                                      "hidden_size": int(size), "use_moe": bool(moe)}
    for place in (Path(folders_in), Path(save_dir)):
        for path in place.glob("*/config.json"):
            found[path.parent.name] = path, {"load_from": str(path.parent), "weight": "", "save_dir": Path(save_dir)}
    order = sorted(found, key=lambda name: (name.startswith("pretrain"), -found[name][0].stat().st_mtime, name))
    return {name: found[name][1] for name in order}


def load_weight(name: str, save_dir: Path = OUT_DIR, hidden_size: int | None = None, use_moe: bool | None = None,
                *arguments, **options) -> tuple[nn.Module, dict]:
    """`read_weight` of the weight `name`. Raises UserError when it is absent, too."""
    return read_weight(find_weight(name, save_dir, hidden_size, use_moe), *arguments, **options)


def read_weight(path: Path, tokenizer: ChatTokenizer | None = None, inference_rope_scaling: bool = False,
                kind: type[nn.Module] = MiniMindForCausalLM, **overrides) -> tuple[nn.Module, dict]:
    """A .pth as an fp32 model of class `kind` on the CPU, and its card ({} where no .json lies beside it).

    Sizes come from the card; without one from the tensors' shapes and the published constants.
    Raises UserError when the file is unreadable, of another shape or for another tokenizer.
    """
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{path}: not a weight file: {first_line(error)}") from None
    card = read_metadata(path)
    if "settings" in state:
        raise UserError(f"{path} is a LoRA: attach it to its base, --weight {card.get('parent', 'BASE')} "
                        f"--lora_weight {weight_name(path)}")
    if tokenizer and card.get("tokenizer", tokenizer.hash) != tokenizer.hash:
        folder = find_tokenizer(card["tokenizer"], path.parent) or "FOLDER"
        raise UserError(f"{path} was trained with another tokenizer ({card['tokenizer']}, not {tokenizer.hash} of "
                        f"{tokenizer.folder}); name its folder: --tokenizer {folder}")
    sizes = (card.get("config") or infer_config(state, path)) | overrides
    if "score.weight" in state and kind is MiniMindForCausalLM:
        raise UserError(f"{path} is a reward model: it scores and does not talk; name another weight")
    model = kind(MiniMindConfig(**sizes, inference_rope_scaling=inference_rope_scaling))
    load_state(model, state, path)
    return model, card


def read_metadata(path: Path) -> dict:
    """The .json beside a weight; {} where there is none. Raises UserError when it cannot be read."""
    path = path.with_suffix(".json")
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the description of a weight: {first_line(error)}") from None


def find_tokenizer(tokenizer_hash: str, save_dir: Path) -> Path | None:
    """The folder of the tokenizer with this hash: model/, or one in `save_dir`, as download_model.py writes them."""
    folders = [TOKENIZER_DIR, *sorted(path.parent for path in save_dir.glob("*/tokenizer.json"))]
    texts = ((folder, (folder / "tokenizer.json").read_text("utf-8")) for folder in folders)
    return next((folder for folder, text in texts if hash_tokenizer(text) == tokenizer_hash), None)


def load_state(model: nn.Module, state: dict, path: Path) -> None:
    """load_state_dict, with a mismatch told in one line."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{path} does not fit the model: {details}") from None


def infer_config(state: dict, path: Path) -> dict:
    """The configuration of a state dict without a card: sizes from its shapes, the rest as published."""
    try:
        first = "model.layers.0."
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        head_dim, = state[f"{first}self_attn.q_norm.weight"].shape
        use_moe = f"{first}mlp.gate.weight" in state
        stacked, single = f"{first}mlp.experts.down_proj", f"{first}mlp.experts.0.down_proj.weight"
        down = state[stacked if stacked in state else single if use_moe else f"{first}mlp.down_proj.weight"]
        return {
            "vocab_size": vocab_size, "hidden_size": hidden_size, "head_dim": head_dim, "use_moe": use_moe,
            "num_hidden_layers": sum(key.endswith("self_attn.q_norm.weight") for key in state),
            "num_attention_heads": state[f"{first}self_attn.q_proj.weight"].shape[0] // head_dim,
            "num_key_value_heads": state[f"{first}self_attn.k_proj.weight"].shape[0] // head_dim,
            "intermediate_size": down.shape[-1], "norm_topk_prob": True,
            "num_experts": len(state[f"{first}mlp.gate.weight"]) if use_moe else 4,
        }
    except (KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a MiniMind state dict, it lacks {error}") from None


def qwen3_config(config: MiniMindConfig, **options) -> PretrainedConfig:
    """The same sizes in the words of transformers' Qwen3 or Qwen3-MoE, whose parameters have the same names."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    ours = {"model_type", "architectures", "auto_map", "use_moe", "inference_rope_scaling"}
    if not config.use_moe:  # engines take a model that has experts for a MoE
        ours |= {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
                 "router_aux_loss_coef"}
    sizes = {name: value for name, value in config.to_dict().items() if name not in ours}
    if config.use_moe:  # SGLang reads the head of a Qwen3-MoE from its own weights
        sizes["tie_word_embeddings"] = False
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return (Qwen3MoeConfig if config.use_moe else Qwen3Config)(**sizes | options, rope_parameters=rope)


def minimind_config(config: PretrainedConfig) -> MiniMindConfig:
    """The sizes of a Qwen3 or Qwen3-MoE in our words. Raises UserError for what our decoder does not have."""
    rope = getattr(config, "rope_parameters", None) or {}
    wanted = {"model_type": ("qwen3", "qwen3_moe"), "hidden_act": ("silu",), "attention_bias": (False,),
              "use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
    unlike = [f"{name} {getattr(config, name)}" for name, values in wanted.items()
              if getattr(config, name, values[0]) not in values]
    if not unlike and rope.get("rope_type", "default") != "default":
        unlike = [f"rope_type {rope['rope_type']}"]
    if unlike:
        raise UserError(f"MiniMind has no such model: {', '.join(unlike)}; it reads Qwen3 and Qwen3-MoE as published")
    sizes = {name: getattr(config, name) for name in CONFIG_KEYS if hasattr(config, name)}
    return MiniMindConfig(**sizes | {"use_moe": config.model_type == "qwen3_moe", "rope_theta": rope["rope_theta"]})


def from_hf_model(model: nn.Module) -> MiniMindForCausalLM:
    """A Qwen3 or Qwen3-MoE of transformers as our own class; ours as it is."""
    if isinstance(model, MiniMindForCausalLM):
        return model
    config, state = minimind_config(model.config), model.state_dict()
    config.tie_word_embeddings = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    ours = MiniMindForCausalLM(config)
    ours.load_state_dict(state)
    return ours


def chat_template(tokenizer: ChatTokenizer) -> str:
    """The template that lies with the tokenizer; that of model/chat.py where none does."""
    own, settings = tokenizer.folder / "chat_template.jinja", tokenizer.folder / "tokenizer_config.json"
    if not own.is_file() and settings.is_file():
        template = json.loads(settings.read_text("utf-8")).get("chat_template")
        if isinstance(template, str):
            return template
    return (own if own.is_file() else TOKENIZER_DIR / own.name).read_text("utf-8")


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
        theirs = MiniMindForCausalLM(MiniMindConfig(**model.config.to_dict() | {"auto_map": AUTO_MAP}))
    else:
        name = f"{'Qwen3Moe' if model.config.use_moe else 'Qwen3'}For{kind}"
        theirs = getattr(transformers, name)(qwen3_config(model.config, **options))
    theirs.load_state_dict(model.state_dict())
    theirs.to(dtype).save_pretrained(folder)
    if as_minimind:
        for module in (model_minimind, attention, linear, moe):  # imported relatively, so transformers finds them
            shutil.copy(module.__file__, folder)
    else:  # transformers 5 renamed these; engines and transformers 4 read the old names, and have defaults for them
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config |= {"rope_theta": model.config.rope_theta, "torch_dtype": config["dtype"]}
        config |= {"num_experts": model.config.num_experts} if model.config.use_moe else {}
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    for part in ("tokenizer.json", "tokenizer_config.json"):
        source = tokenizer.folder / part
        shutil.copyfile(source if source.is_file() else TOKENIZER_DIR / part, folder / part)
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer), "utf-8")


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
    if absent := sorted(loaded["missing_keys"]):  # transformers would leave them random, behind a warning
        raise UserError(f"{flag} {folder}: its weights lack {absent[0]} and {len(absent) - 1} others")
    return model, ChatTokenizer(folder)
