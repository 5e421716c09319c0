"""Which share of the tokens each expert gets while a small mixture of experts trains, with and without balancing."""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from dataset import sample_world
from dataset.reader import parse_row, read_lines
from model.chat import ChatTokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

STEPS, ROWS, LENGTH = 150, 8, 128
COLOURS = ["#2a9d8f", "#e76f51", "#8a7bd1", "#d9a02b"]


def token_stream() -> torch.Tensor:
    """Texts of the sample world, one after another, as rows of ids [STEPS · ROWS, LENGTH]."""
    with tempfile.TemporaryDirectory() as folder:
        sample_world.write(Path(folder), scale=0.35)
        texts = [parse_row(line)["text"] for _, line in read_lines(Path(folder) / "pretrain.jsonl")]
    ids = [i for encoded in ChatTokenizer().encode_texts(texts) for i in encoded]
    ids = torch.tensor(ids).repeat(-(-STEPS * ROWS * LENGTH // len(ids)))
    return ids[:STEPS * ROWS * LENGTH].view(-1, LENGTH)


def expert_load(coefficient: float, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Train from the same random weights; → each expert's share of the tokens [layers, STEPS, E], the last loss."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, use_moe=True,
        router_aux_loss_coef=coefficient))
    optimizer, shares = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: shares.append(output[1][0].detach()))
    losses = []
    for step, batch in enumerate(rows.split(ROWS)):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20)
        output = model(batch, labels=batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((output.loss - coefficient * output.aux_loss).item())
    return torch.stack(shares).unflatten(0, (-1, 2)).transpose(0, 1), sum(losses[-10:]) / 10


def draw() -> Figure:
    rows = token_stream()
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), sharex=True, sharey=True)
    for column, coefficient in enumerate((0.0, 5e-4, 2e-2)):
        shares, loss = expert_load(coefficient, rows)
        print(f"coefficient {coefficient:g}: loss {loss:.3f}, shares at the end")
        for row, (name, share) in enumerate({"both layers": shares.mean(0), "layer 1": shares[1]}.items()):
            share = share.unflatten(0, (-1, 3)).mean(1)  # of three steps
            axes[row, column].stackplot(range(0, STEPS, 3), share.T, colors=COLOURS, lw=0)
            axes[row, column].set(xlim=(0, STEPS - 3), ylim=(0, 1))
            print(f"  {name}: {[round(x, 2) for x in share[-7:].mean(0).tolist()]}")
        axes[0, column].set_title(f"coefficient {coefficient:g}")
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("both layers")
    axes[1, 0].set_ylabel("layer 1")
    return figure
