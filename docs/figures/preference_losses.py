"""The loss of a pair, and the pull of its gradient, by the margin between the two answers."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from trainer.losses import preference_losses


def draw() -> Figure:
    margin = torch.linspace(-5, 5, 201, requires_grad=True)
    losses = preference_losses(margin, torch.zeros(()), "sigmoid", beta=1.0)
    slope, = torch.autograd.grad(losses.sum(), margin)
    figure, axes = plt.subplots(figsize=(7, 2.9))
    axes.plot(margin.detach(), losses.detach(), label="loss of the pair")
    axes.plot(margin.detach(), -slope, label="pull on the margin")
    axes.axvline(0, color="#808891", lw=0.8)
    axes.text(-0.1, 4.2, "wrong way round ", ha="right")
    axes.text(0.1, 4.2, " right way round")
    axes.set(xlabel="β · margin", ylim=(0, 4.8))
    axes.legend(loc="center right")
    return figure
