"""LoRA: a frozen weight W and beside it the product of two narrow matrices, y = W·x + alpha/rank · B·(A·x).

Hu et al. 2021, https://arxiv.org/abs/2106.09685. A starts at random and B at zero, so training starts at the base.
The base keeps its parameters and their names; a layer that is adapted only has `lora_A` and `lora_B` more.
A LoRA file holds those tensors and the settings that attach them: {name: tensor, …, "settings": {…}}.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chat import ChatTokenizer
from model.cli import UserError, first_line
from model.linear import Linear
from model.moe import Experts, grouped_linear
from model.weights import OUT_DIR, find_weight, save_weight, weight_name, weights_hash

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """How a model is adapted. `targets`: last names of the layers; `base`: weights_hash of the model it belongs to."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of what goes into A, in training
    targets: tuple[str, ...] = TARGETS
    base: str = ""


def init_lora_AB(shape: torch.Size, rank: int, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """A [..., rank, in] and B [..., out, rank] for a weight [..., out, in]; A as a linear layer starts, B zero."""
    *stack, out, width = shape
    bound = 1 / math.sqrt(width)
    down = torch.empty(*stack, rank, width, device=device).uniform_(-bound, bound)
    return nn.Parameter(down), nn.Parameter(torch.zeros(*stack, out, rank, device=device))


class LoRALinear(nn.Linear):
    """A linear layer with its branch; the weight is the very parameter of `base`."""

    def __init__(self, base: nn.Linear, lora: LoRA):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.lora_A, self.lora_B = init_lora_AB(base.weight.shape, lora.rank, base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        narrow = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + F.linear(narrow, self.lora_B) * self.scale


class LoRAExperts(Experts):
    """A stack of experts, each with branches of its own at those of its weights that are in `lora.targets`."""

    def __init__(self, base: Experts, lora: LoRA):
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in ("gate_up_proj", "down_proj"):
            if name in lora.targets:
                weight = getattr(base, name)
                self.lora_A[name], self.lora_B[name] = init_lora_AB(weight.shape, lora.rank, weight.device)

    def project(self, name: str, x: Tensor, load: Tensor) -> Tensor:
        y = super().project(name, x, load)
        if name not in self.lora_A:
            return y
        narrow = grouped_linear(F.dropout(x, self.dropout, self.training), self.lora_A[name], load)
        return y + grouped_linear(narrow, self.lora_B[name], load) * self.scale


def find_target_modules(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """The layers of the blocks that can be adapted: last name → [(name of the module, module)]."""
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if ".layers." not in path:
            continue
        if isinstance(module, nn.Linear):
            found.setdefault(path.rsplit(".", 1)[1], []).append((path, module))
        elif isinstance(module, Experts):
            for name in ("gate_up_proj", "down_proj"):
                found.setdefault(name, []).append((path, module))
    return found


def apply_lora(model: nn.Module, lora: LoRA) -> None:
    """Freeze `model` and give the layers `lora.targets` their branches, in place.

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
    """The tensors of the branches, by name."""
    return {name: p for name, p in model.named_parameters() if ".lora_A" in name or ".lora_B" in name}


def merge_lora(model: nn.Module, weight: float = 1.0) -> None:
    """W ← W + weight · alpha/rank · B·A, and the branches go, in place."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            with torch.device("meta"):
                plain = Linear(layer.in_features, layer.out_features)
            plain.weight, plain.bias = layer.weight, layer.bias
            pairs = [(layer.weight, layer.lora_A, layer.lora_B)]
        elif isinstance(layer, LoRAExperts):
            plain = Experts.__new__(Experts)
            nn.Module.__init__(plain)
            plain.gate_up_proj, plain.down_proj = layer.gate_up_proj, layer.down_proj
            pairs = [(getattr(layer, name), layer.lora_A[name], layer.lora_B[name]) for name in layer.lora_A]
        else:
            continue
        with torch.no_grad():
            for base, down, up in pairs:
                base += (up.float() @ down.float() * (weight * layer.scale)).to(base.dtype)
        model.set_submodule(path, plain.train(layer.training))


def save_lora(model: nn.Module, name: str, save_dir: Path, tokenizer: ChatTokenizer, lora: LoRA, **facts) -> Path:
    """Write the branches of `model` and their settings to {save_dir}/{name}_{hidden_size}[_moe].pth, and a .json."""
    settings = asdict(lora) | {"targets": list(lora.targets)}
    return save_weight(model, name, save_dir, tokenizer, lora_state(model) | {"settings": settings}, lora=settings,
                       **facts)


def read_lora(path: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """A LoRA file. Raises UserError when it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = state.pop("settings")
        return LoRA(**settings | {"targets": tuple(settings["targets"])}), state
    except Exception as error:
        raise UserError(f"{path}: not a LoRA file: {first_line(error)}") from None


def load_adapter_state(model: nn.Module, lora: LoRA, state: dict[str, Tensor], source: str | Path) -> None:
    """Give `model` the branches of `state`, which was read from `source`. Raises UserError when they do not fit."""
    apply_lora(model, lora)
    wanted = lora_state(model)
    wrong = [name for name in wanted.keys() | state.keys()
             if name not in wanted or name not in state or wanted[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"{source} does not fit this model: {min(wrong)} and {len(wrong) - 1} others are absent or of "
                        "another shape; name the base it was trained on")
    with torch.no_grad():
        for name, value in state.items():
            wanted[name].copy_(value)


def compatible_adapters(save_dir: Path, base: str) -> list[str]:
    """Names of the LoRAs of `save_dir` that were trained, by their .json, on the model whose weights_hash is `base`."""
    found = []
    for path in sorted(Path(save_dir).glob("lora_*.pth")):
        try:
            if json.loads(path.with_suffix(".json").read_text("utf-8"))["lora"]["base"] == base:
                found.append(weight_name(path))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # without its card nobody knows
    return found


def load_lora(model: nn.Module, name: str, save_dir: Path = OUT_DIR) -> LoRA:
    """`load_adapter_file` of the LoRA `name`. Raises UserError when there is none of this size, too."""
    path = find_weight(name, save_dir, model.config.hidden_size, bool(getattr(model.config, "use_moe", False)))
    return load_adapter_file(model, path)


def load_adapter_file(model: nn.Module, path: Path, base: str | None = None) -> LoRA:
    """Attach a LoRA file to the base it was trained on. `base`: the weights_hash of the model, if it is known.

    Raises UserError when it is no LoRA, or belongs to another base.
    """
    lora, state = read_lora(path)
    if lora.base != (base or weights_hash(model)):
        raise UserError(f"{path} was trained on another base than this one; name its base "
                        "(its .json tells which), or train it again on this one")
    load_adapter_state(model, lora, state, path)
    return lora
