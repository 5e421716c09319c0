"""How strongly one sampled token moves the policy, against how far the policy has already moved."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from trainer.arguments import POLICY_DEFAULTS
from trainer.losses import policy_losses


def draw() -> Figure:
    """-d loss / d log p of a token by its ratio, from `policy_losses` itself; left a better, right a worse answer."""
    figure, axes = plt.subplots(1, 2, sharey=False, figsize=(8, 3.2))
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        for loss_type, label, dashes in (("grpo", "PPO, GRPO", ()), ("cispo", "CISPO", (4, 2))):
            low, high, _ = POLICY_DEFAULTS[loss_type]
            old = torch.zeros(700)
            new = torch.linspace(0.02, 7, len(old)).log().requires_grad_()
            loss = policy_losses(new, old, torch.full_like(old, advantage), loss_type, low, high)
            push, = torch.autograd.grad(-loss.sum(), new)
            axis.plot(new.detach().exp(), push, label=label, dashes=dashes)
        axis.axvspan(0.8, 1.2, alpha=0.15, color="#808891", linewidth=0)
        axis.set(xlabel="ratio ρ = new p / old p", title=f"advantage {advantage:+.0f}")
    axes[0].set_ylabel("push on log p")
    axes[0].legend()
    return figure
