"""AdamW, Muon for the hidden matrices, and the learning-rate schedule."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

STACK_SIZE = 2**23  # elements orthogonalised together: enough to saturate the device, few compared with the weights


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str = "cosine") -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to a tenth of it at the last step.

    `schedule` "wsd": warm-up, then constant, then linear decay to 0 over the last fifth (Hu et al. 2024,
    https://arxiv.org/abs/2404.06395).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "wsd":
        return peak * min(1.0, 5 * max(0, steps - step) / max(1, steps - warmup))
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the rate of every param group to `lr` times its "lr_scale"."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), as torch.optim.Muon.

    Unlike torch's, it takes stacks of matrices [E, rows, columns], so it trains experts too, and it works in `dtype`: a
    CPU without bf16 units needs four times as long in bf16 as in fp32. The update is scaled by
    0.2 · sqrt(max(rows, columns)) to the size of AdamW's, so one learning rate serves both (Liu et al. 2025).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stacks: dict[tuple, list] = defaultdict(list)  # matrices of one shape are orthogonalised together
            for parameter in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                nesterov = nesterov.mT if is_tall(nesterov) else nesterov
                stack = stacks[nesterov.shape[-2:]]
                stack.append((parameter, nesterov.reshape(-1, *nesterov.shape[-2:])))
                if sum(matrices.numel() for _, matrices in stack) >= STACK_SIZE:
                    self._update(stack, group)
                    stack.clear()
            for stack in stacks.values():
                self._update(stack, group)

    def _update(self, stack: list[tuple[nn.Parameter, Tensor]], group: dict) -> None:
        """Step the parameters of `stack` by their momenta [n, rows, columns], which have one shape of matrices."""
        if not stack:
            return
        lr, momenta = group["lr"], [matrices for _, matrices in stack]
        updates = orthogonalise(torch.cat(momenta), self.dtype).split([len(matrices) for matrices in momenta])
        for (parameter, _), update in zip(stack, updates, strict=True):
            update = update.mT if is_tall(parameter) else update
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(update.reshape(parameter.shape), alpha=-lr * 0.2 * max(parameter.shape[-2:]) ** 0.5)


def is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def orthogonalise(x: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Move the singular values of each wide matrix of `x` [n, rows, columns] near 1: Newton-Schulz steps in `dtype`."""
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)  # a gradient may be too small for fp16
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x


def make_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float,
                    muon_dtype: torch.dtype = torch.bfloat16,
                    lr_scales: dict[str, float] | None = None) -> list[torch.optim.Optimizer]:
    """`adamw`: one fused AdamW (Loshchilov & Hutter 2019), with weight decay on matrices only.

    `muon`: Muon for the matrices of the blocks, AdamW for embeddings, router and norms. `lr_scales`: factors on the
    learning rate by the prefix of a parameter's name; each param group keeps its factor as "lr_scale".
    """
    def lr_scale(key: str) -> float:
        return next((scale for prefix, scale in (lr_scales or {}).items() if key.startswith(prefix)), 1.0)

    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    hidden = {key for key, p in trained.items()
              if name == "muon" and p.dim() >= 2 and ".layers." in key and not key.endswith("mlp.gate.weight")}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = defaultdict(list)
    for key, p in trained.items():
        groups[key in hidden, weight_decay if p.dim() >= 2 else 0.0, lr_scale(key)].append(p)
    adamw, muon = ([{"params": params, "weight_decay": decay, "lr_scale": scale}
                    for (is_hidden, decay, scale), params in groups.items() if is_hidden == for_muon]
                   for for_muon in (False, True))
    device = next(iter(trained.values())).device.type
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr, betas=(0.9, 0.95), fused=device in ("cuda", "cpu")))
    if muon:
        optimizers.append(Muon(muon, lr, weight_decay, dtype=muon_dtype))
    return optimizers
