"""Log-likelihoods of given continuations, the measure of perplexity and of multiple-choice benchmarks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

HEAD_ROWS = 1024  # positions whose logits are in memory at once


class ScoringRequest(NamedTuple):
    """Each of `options` is scored as the continuation of `context`. Token ids; no list is empty."""

    context: list[int]
    options: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens that the model reads: all but the last one of each option."""
        return len(self.context) + sum(len(option) - 1 for option in self.options)


def log_likelihoods(model: nn.Module, requests: list[ScoringRequest], batch_tokens: int = 8192) -> list[list[float]]:
    """Σ log p (nats) of each option of each request. `model`: ours, or a decoder of transformers with Qwen3's parts.

    A request is one row: the context once, then the options, each of which sees the context and itself.
    A batch has rows of similar length, at most `batch_tokens` positions or one row.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(requests)), key=lambda i: requests[i].length):
        if not batches or (len(batches[-1]) + 1) * requests[i].length > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    results: list[list[float]] = [[] for _ in requests]
    for batch in tqdm(batches[::-1], unit="batch", disable=None):  # longest first: if memory is short, it shows at once
        for i, scores in zip(batch, _score([requests[i] for i in batch], model), strict=True):
            results[i] = scores
    return results


@torch.inference_mode()
def _score(requests: list[ScoringRequest], model: nn.Module) -> list[list[float]]:
    """The log-likelihoods of one batch, see `log_likelihoods`."""
    # 1. Rows [B, T]: the context, then the options, all of which continue at the context's end.
    width = max(request.length for request in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    option_index = torch.zeros_like(ids)  # 0: the context, and padding, which no token sees; n: the n-th option
    position_ids = torch.arange(width).repeat(len(requests), 1)
    logits_indices, targets, lengths = [], [], []
    for row, (context, options) in enumerate(requests):
        start = end = len(context)
        ids[row, :start] = torch.tensor(context)
        for number, option in enumerate(options, 1):
            begin, end = end, end + len(option) - 1
            ids[row, begin:end] = torch.tensor(option[:-1])
            option_index[row, begin:end] = number
            position_ids[row, begin:end] = torch.arange(start, start + len(option) - 1)
            logits_indices += [row * width + at for at in (start - 1, *range(begin, end))]
            targets += option
            lengths.append(len(option))
    ids, option_index, position_ids, logits_indices, targets = (
        torch.as_tensor(x).to(model.device) for x in (ids, option_index, position_ids, logits_indices, targets))
    # 2. log p of each token of the options.
    mask = option_mask(option_index) if option_index.max() > 1 else None  # else it is plainly causal
    hidden = model.model(input_ids=ids, position_ids=position_ids, attention_mask=mask,
                         use_cache=False)[0].flatten(0, 1)
    log_p = torch.cat([
        -F.cross_entropy(model.lm_head(hidden[index]).float(), target, reduction="none")
        for index, target in zip(logits_indices.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)])
    # 3. The sum over each option.
    sums = iter(option.double().sum().item() for option in log_p.cpu().split(lengths))
    return [[next(sums) for _ in request.options] for request in requests]


def option_mask(option_index: Tensor) -> Tensor:
    """option_index [B, T] → the keys each query sees, [B, 1, T, T] bool: those of 0 and of its own, up to itself."""
    keys, queries = option_index[:, None, None, :], option_index[:, None, :, None]
    return ((keys == 0) | (keys == queries)) & torch.ones_like(keys & queries, dtype=torch.bool).tril()
