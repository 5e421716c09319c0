"""How likely a decoder finds given continuations: what perplexity and multiple-choice benchmarks are made of."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

HEAD_ROWS = 1024  # positions whose logits are in memory at a time


class Request(NamedTuple):
    """What is to be scored: each of `options` as what follows `context`. Token ids; none of the lists is empty."""

    context: list[int]
    options: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens the model has to read: nothing follows an option's last one."""
        return len(self.context) + sum(len(option) - 1 for option in self.options)


def likelihoods(model: nn.Module, requests: list[Request], batch_tokens: int = 8192) -> list[list[float]]:
    """Σ log p (nats) of each option of each request. `model`: ours, or a decoder of transformers with Qwen3's parts.

    A request is one row: the context once, then the options, which see it and themselves but not each other.
    A batch holds rows of about one length, at most `batch_tokens` positions or one row.
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
def _score(requests: list[Request], model: nn.Module) -> list[list[float]]:
    """The same for one batch."""
    width = max(request.length for request in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    branch = torch.zeros_like(ids)  # 0: context, and padding, which nothing real sees; n: the n-th option
    positions = torch.arange(width).repeat(len(requests), 1)
    asked, targets, lengths = [], [], []
    for row, (context, options) in enumerate(requests):
        start = end = len(context)
        ids[row, :start] = torch.tensor(context)
        for number, option in enumerate(options, 1):
            begin, end = end, end + len(option) - 1
            ids[row, begin:end] = torch.tensor(option[:-1])
            branch[row, begin:end] = number
            positions[row, begin:end] = torch.arange(start, start + len(option) - 1)
            asked += [row * width + at for at in (start - 1, *range(begin, end))]
            targets += option
            lengths.append(len(option))
    ids, branch, positions, at, wanted = (torch.as_tensor(each).to(model.device)
                                          for each in (ids, branch, positions, asked, targets))
    mask = tree_mask(branch) if branch.max() > 1 else None  # else it is plainly causal
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)[0].flatten(0, 1)
    log_p = torch.cat([-F.cross_entropy(model.lm_head(hidden[part]).float(), target, reduction="none")
                       for part, target in zip(at.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True)])
    sums = iter(part.double().sum().item() for part in log_p.cpu().split(lengths))
    return [[next(sums) for _ in request.options] for request in requests]


def tree_mask(branch: Tensor) -> Tensor:
    """branch [B, T] → which keys each query sees, [B, 1, T, T] bool: those of branch 0 and of its own, up to itself."""
    keys, queries = branch[:, None, None, :], branch[:, None, :, None]
    return ((keys == 0) | (keys == queries)) & torch.ones_like(keys & queries, dtype=torch.bool).tril()
