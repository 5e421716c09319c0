"""Which earlier tokens each token of a sentence attends to, in a model that `make demo` trained."""

from unittest import mock

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from model import model_minimind
from model.chat import ChatTokenizer
from model.weights import load_weight

TEXT = 'Please compute 751 + 888.\n{"name": "calculate_math", "arguments": {"expression": "751 + 888"}}'


def attention_weights(model, token_ids: list[int]) -> list[torch.Tensor]:
    """softmax(q·kᵀ / √D) of each layer over the tokens before and at each: [query heads, T, T]."""
    weights, kernel = [], model_minimind.attention

    def record(q, k, v, layout):
        q_HTD, k_HTD = q[0].transpose(0, 1).float(), k[0].transpose(0, 1).float()
        k_HTD = k_HTD.repeat_interleave(len(q_HTD) // len(k_HTD), dim=0)
        scores = q_HTD @ k_HTD.mT / q.shape[-1] ** 0.5
        weights.append(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1))
        return kernel(q, k, v, layout)

    with mock.patch.object(model_minimind, "attention", record), torch.no_grad():
        model(torch.tensor([token_ids]))
    return weights


def draw() -> Figure:
    """The head that attends most to the token before, and the one that attends most to what followed last time."""
    tokenizer = ChatTokenizer()
    model, _ = load_weight("full_sft", hidden_size=128)  # of `make demo`
    ids = tokenizer.encode_text(TEXT)
    labels = [tokenizer.decode([i]).strip() for i in ids]
    heads = torch.cat(attention_weights(model, ids))  # [layers · heads, T, T]
    pairs = list(zip(ids, ids[1:], strict=False))
    repeated = [(i, max(j for j in range(i) if pairs[j] == pair)) for i, pair in enumerate(pairs) if pair in pairs[:i]]
    before = heads.diagonal(-1, 1, 2).mean(-1)
    induction = torch.stack([heads[:, i, j + 1] for i, j in repeated]).mean(0)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
    for axis, head, title in ((axes[0], before.argmax(), "the token before"),
                              (axes[1], induction.argmax(), "what followed last time")):
        future = torch.ones_like(heads[head]).triu(1).bool()
        axis.imshow(heads[head].masked_fill(future, torch.nan), cmap="viridis", vmin=0, vmax=0.8)
        layer, number = divmod(int(head), model.config.num_attention_heads)
        axis.set(title=f"{title} (layer {layer}, head {number})")
        axis.set_xticks(range(len(ids)), labels, rotation=90, fontsize=7)
        axis.set_yticks(range(len(ids)), labels, fontsize=7)
        axis.tick_params(length=0)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
    return figure
