"""AdamW, Muon for the hidden matrices, and the learning-rate schedule."""

import math

import torch
from torch import Tensor, nn


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
            lr, momentum = group["lr"], group["momentum"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                average = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - momentum)
                update = orthogonalise(parameter.grad.lerp(average, momentum).to(self.dtype))  # Nesterov's look ahead
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape[-2:]) ** 0.5)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of `x` [..., rows, columns] near 1, by a quintic Newton-Schulz iteration."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float,
                    muon_dtype: torch.dtype = torch.bfloat16) -> list[torch.optim.Optimizer]:
    """`adamw`: one fused AdamW (Loshchilov & Hutter 2019), decay on matrices only.

    `muon`: Muon for the matrices of the blocks, AdamW for embeddings, router and norms.
    """
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    hidden = {key for key, p in trained.items()
              if name == "muon" and p.dim() >= 2 and ".layers." in key and not key.endswith("mlp.gate.weight")}
    matrices = [p for key, p in trained.items() if key not in hidden and p.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0}]
    device = next(iter(trained.values())).device.type
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=device in ("cuda", "cpu")))
    if hidden:
        optimizers.append(Muon([trained[key] for key in sorted(hidden)], lr, weight_decay, dtype=muon_dtype))
    return optimizers
