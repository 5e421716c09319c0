"""The plain loop that the engine is measured against: one padded batch from beginning to end, a cache that grows.

Matrix products are `F.linear`'s, the cache grows by concatenation, top-p sorts the whole vocabulary, and the batch goes
on until its longest answer ends.
"""

from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE, TOP_P = 0.85, 0.95  # as the programs of inference sample


class GrowingCache:
    """Keys and values of all layers, concatenated at every token."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


@torch.inference_mode()
@mock.patch("model.linear.linear", F.linear)
@mock.patch("model.moe.linear", F.linear)
def plain_loop(model: nn.Module, prompts: list[list[int]], num_tokens: int, temperature: float = TEMPERATURE,
               top_p: float = TOP_P) -> tuple[Tensor, Tensor | None]:
    """Sample `num_tokens` after each prompt. → ids [B, T], prompts padded on the left, and their mask if any is"""
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask, last, cache = None, ids, GrowingCache()
    if min(map(len, prompts)) < width:
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    for _ in range(num_tokens):
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -last.shape[1]:]
        logits = model(last, mask, positions, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        if temperature != 1:
            logits = logits / temperature
        if top_p < 1:
            ordered, order = logits.sort(-1, descending=True)
            probability = ordered.softmax(-1)
            ordered[probability.cumsum(-1) - probability >= top_p] = -float("inf")
            logits = torch.full_like(logits, -float("inf")).scatter(-1, order, ordered)
        last = torch.multinomial(logits.softmax(-1), 1)
        ids = torch.cat((ids, last), 1)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(last)), 1)
    return ids, mask
