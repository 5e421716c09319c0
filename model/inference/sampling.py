"""Sampling: penalties, temperature, truncation, one uniform number per row, and the log-probability of its token.

The order is transformers': logit bias, repetition, presence and frequency penalty, then temperature, top-k, top-p,
min-p. A row is sampled by inverting its own cumulative distribution at its own uniform number, so it never depends on
its neighbours.
Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.chat import EOS, PAD
from model.inference.constraints import Grammar


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError, one line, for a value out of range."""

    max_new_tokens: int = 512
    temperature: float = 0.85  # 0: greedy
    top_p: float = 0.95
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in the prompt or the completion (CTRL, Keskar et al. 2019)
    presence_penalty: float = 0.0  # of tokens in the completion (OpenAI)
    frequency_penalty: float = 0.0  # of tokens in the completion, each time (OpenAI)
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_ids: tuple[int, ...] = (EOS, PAD)
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit) (OpenAI)
    top_logprobs: int | None = None  # also record this many of the likeliest tokens of each step
    grammar: Grammar | None = None  # constrains the completion

    def __post_init__(self):
        bounds_of = {"max_new_tokens": (1, math.inf), "temperature": (0, math.inf), "top_p": (0, 1),
                     "top_k": (0, math.inf), "min_p": (0, 1), "presence_penalty": (-math.inf, math.inf),
                     "frequency_penalty": (-math.inf, math.inf), "top_logprobs": (0, math.inf)}
        for name, (low, high) in bounds_of.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and abs(value) < math.inf):  # also refuses nan
                bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name} must be {'finite' if low == -math.inf else bounds}, not {value}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, not {self.repetition_penalty}")
        if not all(token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias):
            raise ValueError("logit_bias must be pairs of a token id and a finite number")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5  # less would overflow

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def add_logit_bias(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """logits [B, V], to which each row's own `logit_bias` is added."""
    biases = [(row, *bias) for row, p in enumerate(params) for bias in p.logit_bias]
    if not biases:
        return logits
    rows, tokens, values = zip(*biases, strict=True)
    rows, tokens = torch.tensor([rows, tokens], device=logits.device)
    logits = logits.float()
    return logits.index_put((rows, tokens), logits.new_tensor(values), accumulate=True)


def apply_penalties(logits: Tensor, params: SamplingParams, prompt_counts: Tensor,
                    completion_counts: Tensor) -> Tensor:
    """One row's logits [V] after its penalties; the counts [V] say how often each token occurs."""
    seen = prompt_counts + completion_counts > 0
    penalty = params.repetition_penalty
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - params.frequency_penalty * completion_counts - params.presence_penalty * (completion_counts > 0)


def sample(logits: Tensor, params: list[SamplingParams], u: list[float],
           allowed: Tensor | None = None) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
    """One token per row of logits [B, V], each at its own number of `u` in [0, 1), of those `allowed` [B, V] (bool).

    → tokens, their log-probabilities (nats) under the distribution they were sampled from, and the `top_logprobs`
    likeliest (token, log-probability) pairs that could have been sampled (empty where not requested). Temperature 0
    takes the likeliest; its log-probability is that at temperature 1.
    """
    greedy, V = [p.greedy for p in params], logits.shape[1]
    columns = torch.tensor([
        u, greedy, [1.0 if p.greedy else p.temperature for p in params],
        [V if p.greedy or not p.top_k else min(p.top_k, V) for p in params],
        [2.0 if p.greedy or p.top_p == 1 else max(p.top_p, 1e-6) for p in params],
        [0.0 if p.greedy else p.min_p for p in params]], dtype=torch.float32, pin_memory=logits.is_cuda)
    # one copy to the device, which does not wait for the logits
    u, is_greedy, temperature, top_k, top_p, min_p = columns.to(logits.device, non_blocking=True)[..., None]
    finite = logits.float().nan_to_num(0.0, 1e30, -1e30)  # a request with wild penalties, or a diverged model
    if allowed is not None:
        finite = finite.masked_fill(~allowed.to(finite.device, non_blocking=True), -math.inf)
    log_p = (finite / temperature).log_softmax(-1)
    log_mass = log_p.new_zeros(len(log_p), 1)  # of what truncation leaves
    if not all(greedy):
        probs = log_p.exp()
        if any(p.truncates for p in params):
            probs = top_k_top_p_min_p(probs, top_k if any(p.top_k for p in params) else None, top_p, min_p)
            log_mass = probs.sum(-1, keepdim=True).log()
        tokens = inverse_cdf(probs, u)
    if any(greedy):
        likeliest = log_p.argmax(-1, keepdim=True)
        tokens = likeliest if all(greedy) else torch.where(is_greedy.bool(), likeliest, tokens)
    logprobs = log_p.gather(1, tokens) - log_mass
    top_logprobs: list[list[tuple[int, float]]] = [[] for _ in params]
    for row, p in enumerate(params):
        if p.top_logprobs:
            row_log_p = log_p[row] - log_mass[row]
            row_log_p = row_log_p if all(greedy) else row_log_p.where(probs[row] > 0, -math.inf)
            top = row_log_p.topk(min(p.top_logprobs, len(row_log_p)))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            top_logprobs[row] = [(token, value) for token, value in pairs if value > -math.inf]
    tokens, logprobs = torch.cat((tokens, logprobs), 1).T.tolist()  # one copy back; fp32 is exact for ids below 2²⁴
    return list(map(int, tokens)), logprobs, top_logprobs


def top_k_top_p_min_p(probs: Tensor, top_k: Tensor | None, top_p: Tensor, min_p: Tensor) -> Tensor:
    """probs [B, V] with zeros where top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024)
    cut off.

    Top-p is a share of what top-k leaves, min-p one of the likeliest. Equally probable tokens stay or go together.
    `top_k`, `top_p`, `min_p` [B, 1]: V, 2 and 0 cut nothing off.
    """
    ordered, threshold = sort_descending(probs), probs.new_zeros(())
    if top_k is not None:
        threshold = ordered.gather(1, top_k.long() - 1)
        ordered = ordered.where(ordered >= threshold, 0)
    mass = ordered.cumsum(-1)
    nucleus_end = torch.searchsorted(mass, top_p * mass[:, -1:]).clamp_max(probs.shape[1] - 1)
    threshold = torch.maximum(threshold, ordered.gather(1, nucleus_end))
    return probs.where(probs >= torch.maximum(threshold, min_p * ordered[:, :1]), 0)


def sort_descending(probs: Tensor) -> Tensor:
    """Each row's values, largest first."""
    if probs.device.type == "cpu":  # numpy's sort is vectorised: 50 times as fast as torch's on a CPU
        return torch.from_numpy(-np.sort(-probs.numpy(), axis=-1))
    return probs.sort(-1, descending=True).values


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse transform sampling: in each row of probs [B, V] the first token whose cumulative mass exceeds u [B, 1].

    A row need not sum to 1. → [B, 1]
    """
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:].contiguous()
    token = torch.searchsorted(cdf, u * total, right=True)
    return torch.minimum(token, torch.searchsorted(cdf, total))  # rounding leads no further than the last token
