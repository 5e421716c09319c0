"""LoRA: a frozen weight W and beside it the product of two low-rank matrices, y = W·x + alpha/rank · B·(A·x).

Hu et al. 2021, https://arxiv.org/abs/2106.09685. A starts at random and B at zero, so training starts at the base.
The base keeps its parameters and their names; an adapted layer only has `lora_A` and `lora_B` more.
A LoRA file holds these tensors and the settings to attach them with: {name: tensor, …, "settings": {…}}.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chat import ChatTokenizer
from model.cli import UserError
from model.linear import Linear
from model.moe import EXPERT_WEIGHTS, Experts, TokenGroups, grouped_linear
from model.weights import OUT_DIR, find_weight, read_state, save_weight, weight_kind, weight_name, weights_hash

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of the adapters of a model."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of the input of A, in training
    targets: tuple[str, ...] = TARGETS  # last names of the adapted layers
    base: str = ""  # weights_hash of the model that was adapted


def init_lora_AB(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A [..., rank, in], initialised like a linear layer, and B [..., out, rank], zero, for a weight [..., out, in]."""
    *stack, out_features, in_features = weight.shape
    bound = 1 / math.sqrt(in_features)
    A = torch.empty(*stack, rank, in_features, device=weight.device).uniform_(-bound, bound)
    return nn.Parameter(A), nn.Parameter(torch.zeros(*stack, out_features, rank, device=weight.device))


class LoRALinear(nn.Linear):
    """A linear layer with its adapter; it shares the weight of `base`."""

    def __init__(self, base: nn.Linear, lora: LoRAConfig):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.lora_A, self.lora_B = init_lora_AB(base.weight, lora.rank)

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + F.linear(low_rank, self.lora_B) * self.scale


class LoRAExperts(Experts):
    """A stack of experts, each with adapters of its own for those of its weights that are in `lora.targets`."""

    def __init__(self, base: Experts, lora: LoRAConfig):
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in EXPERT_WEIGHTS:
            if name in lora.targets:
                self.lora_A[name], self.lora_B[name] = init_lora_AB(getattr(base, name), lora.rank)

    def project(self, name: str, x: Tensor, groups: TokenGroups | None) -> Tensor:
        y = super().project(name, x, groups)
        if name not in self.lora_A:
            return y
        x = F.dropout(x, self.dropout, self.training)
        low_rank = grouped_linear(x, self.lora_A[name], groups)
        return y + grouped_linear(low_rank, self.lora_B[name], groups) * self.scale


def find_target_modules(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """The layers of the blocks that can be adapted: last name → [(path of the module, module)]."""
    modules: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if ".layers." in path and isinstance(module, (nn.Linear, Experts)):
            for name in EXPERT_WEIGHTS if isinstance(module, Experts) else [path.rsplit(".", 1)[1]]:
                modules.setdefault(name, []).append((path, module))
    return modules


def apply_lora(model: nn.Module, lora: LoRAConfig) -> None:
    """Freeze `model` and give the layers `lora.targets` their adapters, in place.

    Raises UserError when the model has no such layer.
    """
    layers = find_target_modules(model)
    missing = [target for target in lora.targets if target not in layers]
    if missing:
        raise UserError(f"--lora_targets {','.join(missing)}: no such layer; this model has {', '.join(layers)}")
    model.requires_grad_(False)
    for path, layer in dict(pair for target in lora.targets for pair in layers[target]).items():
        model.set_submodule(path, (LoRAExperts if isinstance(layer, Experts) else LoRALinear)(layer, lora))


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the adapters, by name."""
    return {name: p for name, p in model.named_parameters() if ".lora_A" in name or ".lora_B" in name}


@torch.no_grad()
def merge_lora(model: nn.Module, weight: float = 1.0) -> None:
    """W ← W + weight · alpha/rank · B·A, and remove the adapters, in place."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            merged = Linear(layer.in_features, layer.out_features, device="meta")
            adapters = {"weight": (layer.lora_A, layer.lora_B)}
        elif isinstance(layer, LoRAExperts):
            E, H, width = layer.down_proj.shape
            merged = Experts(E, H, width, device="meta")
            adapters = {name: (layer.lora_A[name], layer.lora_B[name]) for name in layer.lora_A}
        else:
            continue
        for name in merged._parameters:
            setattr(merged, name, getattr(layer, name))
        for name, (A, B) in adapters.items():
            W = getattr(merged, name)
            W += (B.float() @ A.float() * (weight * layer.scale)).to(W.dtype)
        model.set_submodule(path, merged.train(layer.training))


def save_lora(model: nn.Module, name: str, save_dir: Path, tokenizer: ChatTokenizer, lora: LoRAConfig,
              **metadata) -> Path:
    """Write the adapters of `model` and their settings to {save_dir}/{name}_{hidden_size}[_moe].pth, and a .json."""
    settings = asdict(lora) | {"targets": list(lora.targets)}
    return save_weight(model, name, save_dir, tokenizer, lora_state(model) | {"settings": settings}, lora=settings,
                       **metadata)


def read_lora(path: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The settings and tensors of a LoRA file, of ours or as MiniMind publishes them. Raises UserError when it is none.

    A published one holds `….lora.A.weight` and `….lora.B.weight`; its scale is 1, and it does not name its base.
    """
    state = read_state(path)
    if settings := state.pop("settings", None):
        return LoRAConfig(**settings | {"targets": tuple(settings["targets"])}), state
    state = {re.sub(r"\.lora\.([AB])\.weight$", r".lora_\1", name): value for name, value in state.items()}
    ranks = {len(value) for name, value in state.items() if name.endswith(".lora_A")}
    if weight_kind(state) != "LoRA" or len(ranks) != 1:
        raise UserError(f"{path}: not a LoRA file")
    rank, = ranks
    return LoRAConfig(rank, rank, targets=tuple(sorted({name.split(".")[-2] for name in state}))), state


def load_adapter_state(model: nn.Module, lora: LoRAConfig, state: dict[str, Tensor], source: str | Path) -> None:
    """Give `model` the adapters of `state`, which was read from `source`. Raises UserError when they do not fit."""
    apply_lora(model, lora)
    adapters = lora_state(model)
    mismatched = [name for name in adapters.keys() | state.keys()
                  if name not in adapters or name not in state or adapters[name].shape != state[name].shape]
    if mismatched:
        raise UserError(f"{source} does not fit this model: {min(mismatched)} and {len(mismatched) - 1} others are "
                        "absent or of another shape; name the base it was trained on")
    with torch.no_grad():
        for name, value in state.items():
            adapters[name].copy_(value)


def load_adapter_file(model: nn.Module, path: Path, base: str | None = None) -> LoRAConfig:
    """Attach a LoRA file to the model it was trained on. `base`: the weights_hash of the model, if it is known.

    Raises UserError when it is no LoRA, or belongs to another model.
    """
    lora, state = read_lora(path)
    if lora.base and lora.base != (base or weights_hash(model)):
        raise UserError(f"{path} was trained on another base than this one; name its base "
                        "(its .json tells which), or train it again on this one")
    load_adapter_state(model, lora, state, path)
    return lora


def load_lora(model: nn.Module, name: str, save_dir: Path = OUT_DIR) -> LoRAConfig:
    """`load_adapter_file` of the LoRA `name`. Raises UserError when there is none of this size, too."""
    path = find_weight(name, save_dir, model.config.hidden_size, bool(getattr(model.config, "use_moe", False)))
    return load_adapter_file(model, path)


def compatible_adapters(save_dir: Path, base: str) -> list[str]:
    """Names of the LoRAs of `save_dir` that were trained, by their .json, on the model whose weights_hash is `base`."""
    names = []
    for path in sorted(Path(save_dir).glob("lora_*.pth")):
        try:
            if json.loads(path.with_suffix(".json").read_text("utf-8"))["lora"]["base"] == base:
                names.append(weight_name(path))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing tells its base
    return names
