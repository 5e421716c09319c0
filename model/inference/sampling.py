"""How the next token is drawn: penalties, temperature, truncation, one uniform number a row, and its log-probability.

The order is transformers': repetition, presence and frequency penalty, then temperature, top-k, top-p, min-p. A row is
drawn by inverting its own cumulative distribution at its own uniform number, so it never depends on its neighbours.
Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.chat import EOS, PAD


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
    def greedy(self) -> bool:
        return self.temperature < 1e-5  # less would overflow

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
    greedy = [sampling.greedy for sampling in samplings]
    temperature = [1.0 if sampling.greedy else sampling.temperature for sampling in samplings]
    finite = logits.float().nan_to_num(0.0, 1e30, -1e30)  # a request with wild penalties, or a diverged model
    log_p = (finite / column(logits, temperature)).log_softmax(-1)
    log_mass = log_p.new_zeros(len(log_p), 1)  # of what truncation leaves
    if not all(greedy):
        p = log_p.exp()
        if any(sampling.truncates for sampling in samplings):
            p = truncate(p, samplings)
            log_mass = p.sum(-1, keepdim=True).log()
        tokens = invert(p, column(logits, uniforms))
    if any(greedy):
        likeliest = log_p.argmax(-1, keepdim=True)
        tokens = likeliest if all(greedy) else torch.where(column(logits, greedy).bool(), likeliest, tokens)
    logprobs = (log_p.gather(1, tokens) - log_mass)[:, 0].tolist()
    tops: list[list] = [[] for _ in samplings]
    for row, sampling in enumerate(samplings):
        if sampling.top_logprobs:
            of_row = log_p[row] - log_mass[row]
            of_row = of_row if all(greedy) else of_row.where(p[row] > 0, -math.inf)
            best = of_row.topk(min(sampling.top_logprobs, len(of_row)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            tops[row] = [(token, value) for token, value in pairs if value > -math.inf]
    return tokens[:, 0].tolist(), logprobs, tops


def truncate(p: Tensor, samplings: list[Sampling]) -> Tensor:
    """Probabilities p [B, V] with zeros where top-k (Fan 2018), top-p (Holtzman 2020), min-p (Nguyen 2024) cut off.

    Top-p is a share of what top-k has left, min-p one of the likeliest. Equally probable tokens stay or go together.
    """
    off = [sampling.greedy for sampling in samplings]
    top_k = [len(p[0]) if o or not s.top_k else min(s.top_k, len(p[0])) for o, s in zip(off, samplings, strict=True)]
    top_p = [2.0 if o or s.top_p == 1 else max(s.top_p, 1e-6) for o, s in zip(off, samplings, strict=True)]
    min_p = [0.0 if o else s.min_p for o, s in zip(off, samplings, strict=True)]
    ordered = sort_descending(p)
    smallest = ordered.gather(1, column(p, top_k).long() - 1)
    if any(sampling.top_k for sampling in samplings):
        ordered = ordered.where(ordered >= smallest, 0)
    mass = ordered.cumsum(-1)
    last = torch.searchsorted(mass, column(p, top_p) * mass[:, -1:]).clamp_max(p.shape[1] - 1)  # of the nucleus
    smallest = torch.maximum(smallest, ordered.gather(1, last))
    return p.where(p >= torch.maximum(smallest, column(p, min_p) * ordered[:, :1]), 0)


def sort_descending(p: Tensor) -> Tensor:
    """Each row's values, largest first."""
    if p.device.type == "cpu":  # numpy's sort is vectorised: 50 times as fast as torch's on a CPU
        return torch.from_numpy(-np.sort(-p.numpy(), axis=-1))
    return p.sort(-1, descending=True).values


def invert(p: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: in each row of p [B, V] the first token whose cumulated p exceeds its number [B, 1].

    p need not sum to 1. → [B, 1]
    """
    cumulated = p.cumsum(-1)
    total = cumulated[:, -1:].contiguous()
    token = torch.searchsorted(cumulated, uniform * total, right=True)
    return torch.minimum(token, torch.searchsorted(cumulated, total))  # rounding leads no further than the last


def column(like: Tensor, values: list) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)[:, None]
