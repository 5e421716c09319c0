"""Rewards: each rule on cases worked by hand and on the sample's own answers, models against transformers, the judge."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from lab import TOKENIZER

from dataset.prompts import Prompt
from dataset.sample_world import World
from model.chat import EOS, PAD, parse_answer
from model.errors import Failure, UserError
from trainer import rewards
from trainer.arguments import Parser
from trainer.rewards import Rewards, exact, format_, make_rewards, repetition, reward_flags
from trainer.rollout_engine import Trajectory


def ids_of(text: str) -> list[int]:
    """Ids of a text in which markers are markers."""
    names = {TOKENIZER.token_bytes[i].decode(): i for i in range(36)}
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [i for piece in pieces for i in ([names[piece]] if piece in names else TOKENIZER.encode_text(piece))]


def said(text: str, gt: tuple = (), thinking: bool = False, finish_reason: str = "stop", question: str = "?") -> tuple:
    """A prompt and what a model answered, markers and all; the stop token unless it was cut off."""
    messages = [{"role": "user", "content": question}]
    prompt = Prompt(TOKENIZER.prompt(messages, open_thinking=thinking), messages, thinking, list(gt), "rows.jsonl:7")
    ids = ids_of(text) + [EOS] * (finish_reason == "stop")
    return prompt, Trajectory(prompt, ids, [True] * len(ids), [-1.0] * len(ids), finish_reason,
                              parse_answer(TOKENIZER, ids, thinking))


def make(*flags: str, **more) -> Rewards:
    parser = Parser()
    reward_flags(parser)
    args = parser.parse_args(flags)
    vars(args).update(more)
    return make_rewards(args, TOKENIZER, torch.device("cpu"))
