"""Prompts → trajectories, sampled from the policy: by the engine in this process, or by a server over HTTP.

Sampling is at one temperature from the whole distribution, because that is the policy whose gradient is taken: top-p,
top-k or penalties would make it another one. A trajectory holds the very ids that were sampled; nothing is tokenised
again.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from dataset.prompts import Prompt
from model.chat import Answer, ChatTokenizer, parse_answer
from model.engine import Engine, Sampling


@dataclass
class Trajectory:
    """What followed a prompt: sampled ids and, in an episode with tools, the ids of what was observed between."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)  # after the prompt
    sampled: list[bool] = field(default_factory=list)  # of each of `ids`: drawn from the policy, so to be trained
    logprobs: list[float] = field(default_factory=list)  # nats, as each was drawn; 0 where nothing was
    finish_reason: str = ""  # "stop", "length", or in an episode "turns": there were no more to take
    answer: Answer = field(default_factory=Answer)  # the last turn, taken apart
    turns: list[Answer] = field(default_factory=list)  # of an episode, all of them
    calls: list[tuple[dict, dict]] = field(default_factory=list)  # of an episode: {"name", "arguments"} and its result

    @property
    def tokens(self) -> list[int]:
        return self.prompt.ids + self.ids

    @property
    def unfinished(self) -> bool:
        return self.finish_reason != "stop"


class LocalEngine:
    """The engine of this process on the policy's own weights: no copy, so nothing can lag behind.

    `autocast`: the context in which the policy is trained; sampling in another precision would be another policy.
    """

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer, autocast: AbstractContextManager | None = None,
                 max_batch: int = 64):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.autocast = autocast or nullcontext()

    def update(self) -> None:
        """The weights have changed. Here they are the policy's own."""

    @contextmanager
    def open(self, requests: int) -> Iterator[Engine]:
        """The engine for up to so many requests at once, on the weights as they are now."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                yield Engine(self.model, max_batch=max(1, min(self.max_batch, requests)))
        finally:
            self.model.train(training)

    def generate(self, prompts: list[Prompt], sampling: list[Sampling]) -> list[Trajectory]:
        """One answer to each prompt, in the same order."""
        with self.open(len(prompts)) as engine:
            sequences = [engine.add(prompt.ids, how) for prompt, how in zip(prompts, sampling, strict=True)]
            while engine.busy:
                engine.step()
        return [Trajectory(prompt, s.ids, [True] * len(s.ids), s.logprobs, s.finish_reason,
                           parse_answer(self.tokenizer, s.ids, prompt.thinking))
                for prompt, s in zip(prompts, sequences, strict=True)]


def full_distribution(max_new_tokens: int, temperature: float, seed: int) -> Sampling:
    """How a policy is sampled for its gradient: nothing cut off, nothing penalised."""
    return Sampling(max_new_tokens, temperature, top_p=1.0, top_k=0, min_p=0.0, seed=seed)
