"""AdamW, Muon for the hidden matrices, and the learning-rate schedule."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

STACK_SIZE = 2**23  # elements orthogonalised at once: enough to fill the machine, little beside the weights


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to a tenth of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), as torch.optim.Muon.

    Two things torch's own cannot do: it takes stacks of matrices [E, rows, columns], so the experts get it too, and
    it works in `dtype`, because a CPU without bf16 units needs four times as long in bf16 as in fp32. The update is
    scaled by 0.2 · sqrt(max(rows, columns)), the size of AdamW's, so one learning rate serves both (Liu et al. 2025).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stacks: dict[tuple, list] = defaultdict(list)  # matrices of one shape go through the products together
            for parameter in (p for p in group["params"] if p.grad is not None):
                average = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"]).to(self.dtype)  # Nesterov's look ahead
                ahead = ahead.mT if is_tall(ahead) else ahead
                stack = stacks[ahead.shape[-2:]]
                stack.append((parameter, ahead.reshape(-1, *ahead.shape[-2:])))
                if sum(piece.numel() for _, piece in stack) >= STACK_SIZE:
                    self._update(stack, group)
                    stack.clear()
            for stack in stacks.values():
                self._update(stack, group)

    def _update(self, stack: list[tuple[nn.Parameter, Tensor]], group: dict) -> None:
        """Step the parameters of `stack`, whose momenta [n, rows, columns] are all of one shape."""
        if not stack:
            return
        lr, pieces = group["lr"], [piece for _, piece in stack]
        updates = orthogonalise(torch.cat(pieces)).split([len(piece) for piece in pieces])
        for (parameter, _), update in zip(stack, updates, strict=True):
            update = update.mT if is_tall(parameter) else update
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(update.reshape(parameter.shape), alpha=-lr * 0.2 * max(parameter.shape[-2:]) ** 0.5)


def is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each wide matrix of `x` [n, rows, columns] near 1: a quintic Newton-Schulz."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x


def make_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float,
                    muon_dtype: torch.dtype = torch.bfloat16,
                    lr_scales: dict[str, float] | None = None) -> list[torch.optim.Optimizer]:
    """`adamw`: one fused AdamW (Loshchilov & Hutter 2019), decay on matrices only.

    `muon`: Muon for the matrices of the blocks, AdamW for embeddings, router and norms. A parameter whose name begins
    with a key of `lr_scales` learns so many times as fast; each group's factor is its "lr_scale".
    """
    def scale_of(name: str) -> float:
        return next((scale for start, scale in (lr_scales or {}).items() if name.startswith(start)), 1.0)

    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    hidden = {key for key, p in trained.items()
              if name == "muon" and p.dim() >= 2 and ".layers." in key and not key.endswith("mlp.gate.weight")}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = defaultdict(list)
    for key, p in trained.items():
        groups[key in hidden, weight_decay if p.dim() >= 2 else 0.0, scale_of(key)].append(p)
    plain, orthogonal = ([{"params": parameters, "weight_decay": decay, "lr_scale": scale}
                          for (muon, decay, scale), parameters in groups.items() if muon == of] for of in (False, True))
    device = next(iter(trained.values())).device.type
    optimizers: list[torch.optim.Optimizer] = []
    if plain:
        optimizers.append(torch.optim.AdamW(plain, lr, betas=(0.9, 0.95), fused=device in ("cuda", "cpu")))
    if orthogonal:
        optimizers.append(Muon(orthogonal, lr, weight_decay, dtype=muon_dtype))
    return optimizers
