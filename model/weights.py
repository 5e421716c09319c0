"""Our weight files: their names, and how they are saved, found and loaded.

`out/{name}_{hidden_size}[_moe].pth` is a plain half-precision state dict. The `.json` beside it is its metadata: the
model's configuration, the tokenizer's hash, the weights it was trained from, tokens, flags and metrics.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from model.chat import TOKENIZER_DIR, ChatTokenizer, tokenizer_hashes
from model.cli import UserError, first_line, notice
from model.files import open_atomically, write_atomically
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[1]
OUT_DIR, CHECKPOINT_DIR = ROOT / "out", ROOT / "checkpoints"
CONFIG_KEYS = ("hidden_size", "num_hidden_layers", "use_moe", "vocab_size", "num_attention_heads",
               "num_key_value_heads", "head_dim", "qk_norm", "intermediate_size", "max_position_embeddings",
               "rms_norm_eps", "rope_theta", "num_experts", "num_experts_per_tok", "n_shared_experts",
               "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef", "tie_word_embeddings")


def file_stem(name: str, config: MiniMindConfig) -> str:
    """`{name}_{hidden_size}[_moe]`, the name that weights, resume states and logs share."""
    return f"{name}_{config.hidden_size}{'_moe' if config.use_moe else ''}"


def weight_name(weight: str | Path) -> str:
    """The name without the sizes: full_sft for out/full_sft_768_moe.pth, full_sft_768 or full_sft."""
    return re.sub(r"_\d+(_moe)?$", "", Path(weight).name.removesuffix(".pth"))


def check_name(name: str, flag: str = "--save_weight") -> str:
    """`name`, if a weight that is saved under it is found under it again; else UserError."""
    if not re.fullmatch(r"\w[\w .+-]*", name) or weight_name(name) != name or name in ("none", "None"):
        raise UserError(f"{flag} {name}: a weight of this name could not be found again; take letters, digits, "
                        "_ . + and -, and leave sizes and .pth out, which are added")
    return name


def weight_kind(parameters: Iterable[str]) -> str:
    """What the names of its tensors make of a weight: a LoRA, a reward model or a language model."""
    names = set(parameters)
    if any(".lora_A" in name or ".lora." in name for name in names):
        return "LoRA"
    return "reward model" if "score.weight" in names else "language model"


def check_target(path: Path, model: nn.Module, sources: Iterable[Path]) -> None:
    """Raise UserError if `model`, saved as `path`, would replace one of `sources` or a weight of another kind."""
    kind = weight_kind(name for name, _ in model.named_parameters())
    flag = f"--{'lora_name' if kind == 'LoRA' else 'save_weight'} {weight_name(path)}"
    if any(path.resolve() == source.resolve() for source in sources):
        raise UserError(f"{flag}: {path} is what this run starts from, and would be lost; name another weight to write")
    try:
        existing = weight_kind(read_state(path))
    except UserError:  # nothing there, or nothing that could be lost
        return
    if existing != kind:
        raise UserError(f"{flag}: {path} is a {existing}, which a {kind} would replace; name another weight to write")


def save_weight(model: nn.Module, name: str, save_dir: Path, tokenizer: ChatTokenizer, state: dict | None = None,
                **metadata) -> Path:
    """Write the state dict of `model`, or `state`, in half precision, and its .json: config, tokenizer and `metadata`.

    → the path of the .pth. Raises OSError when it cannot be written; the files of before are then intact.
    """
    path = Path(save_dir) / f"{file_stem(check_name(name), model.config)}.pth"
    state = model.state_dict() if state is None else state
    with open_atomically(path) as file:
        torch.save({key: value.detach().half().cpu() if torch.is_tensor(value) else value
                    for key, value in state.items()}, file)
    config = {key: getattr(model.config, key, None) for key in CONFIG_KEYS}
    metadata = {"config": config, "tokenizer": tokenizer.hash, "own_template": tokenizer.own_template,
                "tokenizer_folder": str(tokenizer.folder.absolute()), **metadata}
    write_atomically(path.with_suffix(".json"), json.dumps(metadata, indent=1, ensure_ascii=False))
    return path


def weights_hash(model: nn.Module) -> str:
    """Hash of a model's parameters as they would be saved: equal for equal weights, on any device, in any format."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().half().cpu().contiguous().numpy())
    return digest.hexdigest()


def find_weight(name: str, save_dir: Path, hidden_size: int | None = None, use_moe: bool | None = None) -> Path:
    """The .pth that is meant by a name, a name with sizes (full_sft_768_moe) or a path.

    Of several of one name the published default, 768 and dense, is taken, which a line on stderr says. Raises UserError
    when there is none, or when none of several is the default.
    """
    if name.endswith(".pth"):
        path = next((path for path in (Path(name).expanduser(), Path(save_dir) / name) if path.is_file()), None)
        if path is None:
            raise UserError(f"{name}: no such file, here or in {save_dir}")
        return path
    exact = Path(save_dir) / f"{name}.pth"
    if weight_name(name) != exact.stem and exact.is_file():
        return exact
    matches = [path for path in sorted(Path(save_dir).glob(f"{glob.escape(name)}_*.pth"))
               if (size := path.stem[len(name) + 1:].removesuffix("_moe")).isdigit()
               and hidden_size in (None, int(size)) and use_moe in (None, path.stem.endswith("_moe"))]
    if not matches:
        file_name = f"{name}_{hidden_size or '*'}{'_moe' if use_moe else ''}.pth"
        available = ", ".join(path.stem for path in sorted(Path(save_dir).glob("*.pth"))) or "nothing"
        raise UserError(f"no weight {file_name} in {save_dir} (there: {available}); train it first or name another")
    chosen = matches
    for is_default in (lambda path: path.stem.removesuffix("_moe").endswith("_768"),
                       lambda path: not path.stem.endswith("_moe")):
        chosen = [path for path in chosen if is_default(path)] or chosen
    stems = ", ".join(path.stem for path in matches)
    if len(chosen) > 1:
        raise UserError(f"several weights fit {name!r} in {save_dir}: {stems}; choose with --hidden_size and --use_moe")
    if len(matches) > 1:
        notice(f"{chosen[0].stem} is taken of {stems}; --hidden_size and --use_moe choose")
    return chosen[0]


def find_models(save_dir: Path = OUT_DIR, parent_dir: Path = ROOT) -> dict[str, dict]:
    """All models that can chat: {name: arguments of `load_for_inference`}, the newest first, pretrained ones last.

    These are the weights in `save_dir`, without LoRAs and reward models, and the transformers folders in it or in
    `parent_dir`.
    """
    models = {}  # name: (file whose time counts, arguments)
    for path in Path(save_dir).glob("*.pth"):
        if match := re.fullmatch(r"(?!lora_|reward)(.+)_(\d+)(_moe)?", path.stem):
            name, size, moe = match.groups()
            models[path.stem] = path, {"load_from": "model", "weight": name, "save_dir": Path(save_dir),
                                       "hidden_size": int(size), "use_moe": bool(moe)}
    for path in (*Path(parent_dir).glob("*/config.json"), *Path(save_dir).glob("*/config.json")):
        models[path.parent.name] = path, {"load_from": str(path.parent), "weight": "", "save_dir": Path(save_dir)}
    order = sorted(models, key=lambda name: (name.startswith("pretrain"), -models[name][0].stat().st_mtime, name))
    return {name: models[name][1] for name in order}


def load_weight(name: str, save_dir: Path = OUT_DIR, hidden_size: int | None = None, use_moe: bool | None = None,
                *args, **kwargs) -> tuple[nn.Module, dict]:
    """`find_weight`, then `read_weight`."""
    return read_weight(find_weight(name, save_dir, hidden_size, use_moe), *args, **kwargs)


def read_weight(path: Path, tokenizer: ChatTokenizer | None = None, inference_rope_scaling: bool = False,
                model_class: type[nn.Module] = MiniMindForCausalLM, **overrides) -> tuple[nn.Module, dict]:
    """A .pth as an fp32 model of `model_class` on the CPU, and its metadata ({} without a .json).

    The configuration comes from the metadata, else from the shapes of the tensors (`infer_config`); `overrides` replace
    values of it. Raises UserError when the file is unreadable, does not fit the class or needs another tokenizer.
    """
    state, metadata = read_state(path), read_metadata(path)
    if weight_kind(state) == "LoRA":
        raise UserError(f"{path} is a LoRA: attach it to its base, --weight {metadata.get('parent', 'BASE')} "
                        f"--lora_weight {weight_name(path)}")
    if "score.weight" in state and model_class is MiniMindForCausalLM:
        raise UserError(f"{path} is a reward model: it scores conversations and writes no text; name another weight")
    config = (metadata.get("config") or infer_config(state, path)) | overrides
    model = model_class(MiniMindConfig(**config, inference_rope_scaling=inference_rope_scaling))
    load_state(model, state, path)
    if tokenizer:
        check_tokenizer(path, metadata, tokenizer, model.config.vocab_size)
    return model, metadata


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth, under the names they had before DDP and torch.compile wrapped the model.

    Raises UserError when the file is no weight, or holds NaN or infinite numbers.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {re.sub(r"^(module\.|_orig_mod\.)+|_orig_mod\.", "", name): value for name, value in state.items()}
    except Exception as error:
        raise UserError(f"{path}: not a weight file: {first_line(error)}") from None
    if isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a weight file but a resume state (--from_resume); weights are in --save_dir")
    broken = [name for name, value in state.items() if torch.is_tensor(value) and not value.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinite numbers: the run that wrote it diverged, or the "
                        "file is damaged; take another weight")
    return state


def check_tokenizer(path: Path, metadata: dict, tokenizer: ChatTokenizer, num_rows: int) -> None:
    """Raise UserError if the weight `path`, which embeds `num_rows` tokens, was trained with another tokenizer."""
    tokenizer_hash = metadata.get("tokenizer")
    if tokenizer_hash and tokenizer_hash not in tokenizer.hashes:
        folder = find_tokenizer(tokenizer_hash, path, metadata) or "FOLDER"
        raise UserError(f"{path} was trained with another tokenizer ({tokenizer_hash}, not {tokenizer.hash} of "
                        f"{tokenizer.folder}); name its folder: --tokenizer {folder}")
    if num_rows != tokenizer.vocab_size:
        raise UserError(f"{path} embeds {num_rows:,} tokens, but {tokenizer.folder} has {tokenizer.vocab_size:,}: "
                        "not its tokenizer; name the folder of the one it was trained with: --tokenizer FOLDER")


def read_metadata(path: Path) -> dict:
    """The .json beside a .pth; {} where there is none. Raises UserError when it cannot be read."""
    path = path.with_suffix(".json")
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the description of a weight: {first_line(error)}") from None


def find_tokenizer(tokenizer_hash: str, path: Path, metadata: dict) -> Path | None:
    """The folder of the tokenizer with this hash, which the .json of the weight `path` names.

    Looked for in model/, where the weight was trained with it, beside the weight (download_model.py writes it there),
    and among the folders of this project.
    """
    trained_with = Path(metadata.get("tokenizer_folder", TOKENIZER_DIR)) / "tokenizer.json"
    files = [TOKENIZER_DIR / "tokenizer.json", trained_with, *sorted(path.parent.glob("*/tokenizer.json")),
             *sorted(ROOT.glob("*/tokenizer.json"))]
    for file in files:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a tokenizer of another kind
            if tokenizer_hash in tokenizer_hashes(file.read_text("utf-8")):
                return file.parent
    return None


def tokenizer_of(path: Path, tokenizer_dir: str | Path | None) -> Path:
    """The folder of a weight's tokenizer: `tokenizer_dir`, else the one that the weight's .json names.

    Never a guess: raises UserError when neither says.
    """
    if tokenizer_dir:
        return TOKENIZER_DIR if str(tokenizer_dir) == "model" else Path(tokenizer_dir)
    metadata = read_metadata(path)
    if not (tokenizer_hash := metadata.get("tokenizer")):
        raise UserError(f"{path} has no {path.with_suffix('.json').name} beside it that names its tokenizer: name the "
                        "tokenizer's folder, --tokenizer FOLDER, or --tokenizer model if it was trained with ours")
    folder = find_tokenizer(tokenizer_hash, path, metadata)
    if folder is None:
        raise UserError(f"{path} was trained with another tokenizer ({tokenizer_hash}), which is not here; name its "
                        "folder: --tokenizer FOLDER")
    return folder


def load_state(model: nn.Module, state: dict, path: Path) -> None:
    """load_state_dict; a mismatch is a UserError of one line."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{path} does not fit the model: {details}") from None


def infer_config(state: dict, path: Path) -> dict:
    """The configuration of a state dict without metadata: sizes from its shapes, the rest as published.

    Without QK-norm it is a MiniMind2 (26 M, 104 M, or the MoE of 145 M with one shared expert): 8 query heads.
    """
    layer = "model.layers.0."
    if "tok_embeddings.weight" in state:
        raise UserError(f"{path}: its tensors have the names of MiniMind before April 2025, which are not read; "
                        "take a weight that was published since")
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        q_norm, head = state.get(f"{layer}self_attn.q_norm.weight"), state.get("lm_head.weight")
        head_dim = len(q_norm) if q_norm is not None else hidden_size // 8
        use_moe = f"{layer}mlp.gate.weight" in state
        stacked, single = f"{layer}mlp.experts.down_proj", f"{layer}mlp.experts.0.down_proj.weight"
        down = state[stacked if stacked in state else single if use_moe else f"{layer}mlp.down_proj.weight"]
        shared = sum(bool(re.fullmatch(f"{layer}mlp.shared_experts.\\d+.down_proj.weight", key)) for key in state)
        return {
            "vocab_size": vocab_size, "hidden_size": hidden_size, "head_dim": head_dim, "use_moe": use_moe,
            "num_hidden_layers": sum(key.endswith("self_attn.q_proj.weight") for key in state),
            "num_attention_heads": state[f"{layer}self_attn.q_proj.weight"].shape[0] // head_dim,
            "num_key_value_heads": state[f"{layer}self_attn.k_proj.weight"].shape[0] // head_dim,
            "intermediate_size": down.shape[-1], "norm_topk_prob": True,
            "num_experts": len(state[f"{layer}mlp.gate.weight"]) if use_moe else 4,
            "n_shared_experts": shared, "num_experts_per_tok": 2 if shared else 1,
            "tie_word_embeddings": head is None or torch.equal(head, state["model.embed_tokens.weight"]),
            **({} if q_norm is not None else {"qk_norm": False, "rms_norm_eps": 1e-5}),
        }
    except (KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a MiniMind state dict, it lacks {error}") from None
