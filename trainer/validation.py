"""Validation: the mean loss over held-out rows, and bits per byte, which compares models of any tokenizer."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dataset.token_cache import TokenDataset
from model.chat import ChatTokenizer
from trainer.batches import to_device
from trainer.losses import Loss, model_inputs
from trainer.run import Run


@torch.no_grad()
def validate_rows(run: Run, model: nn.Module, data: TokenDataset,
                  loss_fn: Callable[[nn.Module, dict[str, Tensor]], Loss]) -> dict[str, float]:
    """Means of the loss and its metrics over the items of `data`, and bits per byte if `loss_fn` is `text_loss`.

    All ranks call it; each takes its share of the rows. → {"val_loss": …, "val_…": …}
    """
    B, world, sums = run.args.batch_size, run.world, {}
    model.eval()
    for start in range(0, len(data), world.size * B):
        rows = start + world.rank * B + np.arange(B)
        rows[rows >= len(data)] = -1  # whole batches, as many on every rank: all gather the shards
        with run.autocast():
            loss = loss_fn(model, to_device(data.batch(rows), run.device))
        for name, value in {"loss": loss.loss_sum, **loss.metrics}.items():
            sums[name] = sums.get(name, 0) + float(value)
    model.train()
    by_rank = world.gather(sums)
    sums = {name: sum(rank_sums.get(name, 0) for rank_sums in by_rank) for name in by_rank[0]}
    nats, num_bytes = sums.pop("text_nats", 0), sums.pop("text_bytes", 0)
    bits_per_byte = {"val_bpb": nats / num_bytes / math.log(2)} if num_bytes else {}
    num_items = max(int(data.loss_count.sum()), 1)
    return {f"val_{name}": value / num_items for name, value in sums.items()} | bits_per_byte


def text_loss(model: nn.Module, batch: dict[str, Tensor], byte_lengths: Tensor) -> Loss:
    """Next-token loss; beside it, of the targets that are text, the nats and the bytes: `byte_lengths` [V]."""
    logits = model(**model_inputs(batch)).logits
    nats = nn.functional.cross_entropy(logits.float(), batch["targets"], reduction="none").cpu().double()
    num_bytes = byte_lengths[batch["targets"].cpu()]
    return Loss(nats.sum(), metrics={"text_nats": nats[num_bytes > 0].sum(), "text_bytes": num_bytes.sum()})


def byte_lengths(tokenizer: ChatTokenizer) -> Tensor:
    """How many bytes of text each token stands for, 0 for special tokens. → [V]"""
    return torch.tensor([0 if i < 36 else len(text) for i, text in enumerate(tokenizer.token_bytes)])
