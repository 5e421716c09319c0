"""How the next token is drawn: penalties, temperature, truncation, one uniform number a row, and its log-probability.

The order is transformers': repetition, presence and frequency penalty, then temperature, top-k, top-p, min-p. A row is
drawn by inverting its own cumulative distribution at its own uniform number, so it never depends on its neighbours.
Shapes: B rows, V vocabulary, K candidates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.chat import EOS, PAD

Drawn = tuple[Tensor, Tensor, Tensor | None, Tensor]  # tokens [B], their log p [B], candidates [B, K], all log p [B, K]
CANDIDATES = 64  # how many of the likeliest tokens are looked at first; usually top_p or top_k need no more


@dataclass(frozen=True)
class Sampling:
    """What one request asks for. Raises ValueError, one line, for a value out of range."""

    max_new_tokens: int = 512
    temperature: float = 0.85  # 0 takes the likeliest
    top_p: float = 0.95
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of what stands in the prompt or the answer (CTRL, Keskar 2019)
    presence_penalty: float = 0.0  # of what stands in the answer (OpenAI)
    frequency_penalty: float = 0.0  # of what stands in the answer, each time (OpenAI)
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_ids: tuple[int, ...] = (EOS, PAD)
    top_logprobs: int | None = None  # also note so many of the likeliest tokens of each step

    def __post_init__(self):
        inclusive = {"max_new_tokens": (1, math.inf), "temperature": (0, math.inf), "top_p": (0, 1),
                     "top_k": (0, math.inf), "min_p": (0, 1), "presence_penalty": (-math.inf, math.inf),
                     "frequency_penalty": (-math.inf, math.inf), "top_logprobs": (0, math.inf)}
        for name, (low, high) in inclusive.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and abs(value) < math.inf):  # also refuses nan
                bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name} must be {'finite' if low == -math.inf else bounds}, not {value}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, not {self.repetition_penalty}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def penalise(logits: Tensor, sampling: Sampling, in_prompt: Tensor, in_answer: Tensor) -> Tensor:
    """One row's logits [V] after its penalties; `in_prompt` and `in_answer` [V] count each token's occurrences."""
    seen = in_prompt + in_answer > 0
    penalty = sampling.repetition_penalty
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - sampling.frequency_penalty * in_answer - sampling.presence_penalty * (in_answer > 0)


def draw(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> tuple[list[int], list[float], list]:
    """One token a row of logits [B, V], each at its own number in [0, 1).

    → tokens, their log-probabilities (nats) under the distribution they were drawn from, and the `top_logprobs`
    likeliest (token, log-probability) pairs that could have been drawn (empty where nobody asked). Temperature 0 takes
    the likeliest; its log-probability is that at temperature 1.
    """
    logits = logits.float()
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    logprobs = torch.empty(len(logits), device=logits.device)
    tops: list[list] = [[] for _ in samplings]
    groups: dict = {}
    for row, sampling in enumerate(samplings):
        kind = greedy if sampling.temperature == 0 else truncated if sampling.truncates else whole
        groups.setdefault(kind, []).append(row)
    for kind, rows in groups.items():
        of_kind = [samplings[row] for row in rows]
        alone = len(rows) == len(samplings)  # the usual case needs no copy
        numbers = [uniforms[row] for row in rows]
        drawn, logprob, candidates, log_p = kind(logits if alone else logits[rows], of_kind, numbers)
        if alone:
            tokens, logprobs = drawn, logprob
        else:
            tokens[rows], logprobs[rows] = drawn, logprob
        for i, row in enumerate(rows):
            if wanted := samplings[row].top_logprobs:
                best, where = log_p[i].topk(min(wanted, log_p.shape[1]))
                named = where if candidates is None else candidates[i, where]
                pairs = zip(named.tolist(), best.tolist(), strict=True)
                tops[row] = [(token, value) for token, value in pairs if value > -math.inf]
    return tokens.tolist(), logprobs.tolist(), tops


def greedy(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> Drawn:
    log_p = logits.log_softmax(-1)
    best, tokens = log_p.max(-1)
    return tokens, best, None, log_p


def whole(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> Drawn:
    """Draw from the softmax at a temperature."""
    log_p = (logits / column(logits, [s.temperature for s in samplings])).log_softmax(-1)
    tokens = invert(log_p.exp(), uniforms)
    return tokens, log_p.gather(1, tokens[:, None])[:, 0], None, log_p


def truncated(logits: Tensor, samplings: list[Sampling], uniforms: list[float]) -> Drawn:
    """The same after top-k (Fan 2018), top-p (Holtzman 2020) and min-p (Nguyen 2024), among the likeliest tokens only.

    So many candidates are taken that what follows them is cut off in every row; the result is that of a full sort.
    """
    V = logits.shape[1]
    probability = (logits / column(logits, [s.temperature for s in samplings])).softmax(-1)
    top_k = column(logits, [min(s.top_k or V, V) for s in samplings])
    top_p = column(logits, [max(s.top_p, 1e-6) for s in samplings])
    min_p = column(logits, [s.min_p for s in samplings])
    width, enough = min(CANDIDATES, V), False
    while not enough:
        p, candidates = probability.topk(width)
        cut_later = (p.sum(-1, keepdim=True) < top_p) & (p[:, -1:] >= min_p * p[:, :1])
        enough = width == V or bool(((top_k <= width) | (top_k == V) & ~cut_later).all())
        width = min(8 * width, V)
    p = p.masked_fill(torch.arange(p.shape[1], device=p.device) >= top_k, 0)
    mass = torch.where(top_k < V, p.sum(-1, keepdim=True), 1.0)  # top-p is a share of what top-k has left
    before = p.cumsum(-1) - p
    kept = p.masked_fill((before >= top_p * mass) | (p < min_p * p[:, :1]), 0)
    kept = kept / kept.sum(-1, keepdim=True)
    place = invert(kept, uniforms)[:, None]
    return candidates.gather(1, place)[:, 0], kept.gather(1, place)[:, 0].log(), candidates, kept.log()


def invert(probability: Tensor, uniforms: list[float]) -> Tensor:
    """Inverse transform sampling: the first column of each row whose cumulated probability exceeds its number. → [B]"""
    cumulated = probability.cumsum(-1)
    target = column(probability, uniforms) * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, target, right=True)[:, 0]
    last = (cumulated < cumulated[:, -1:]).sum(-1)  # rounding must not lead past the last that has any
    return torch.minimum(place, last)


def column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None]
