"""Rewards of held-out prompts, and sampled answers printed with their advantages."""

from collections.abc import Callable

import torch
from torch import Tensor

from dataset.prompts import PromptDataset
from model.chat import ChatTokenizer
from model.inference.sampling import SamplingParams


def make_rollout_eval(run, prompts: PromptDataset | None, engine, rewards) -> Callable[[], dict] | None:
    """A validation: → {"val_reward", "val_…" of each component}, means over greedy answers to `prompts`."""
    if prompts is None:
        return None

    def validate() -> dict:
        own = prompts.prompts[run.world.rank::run.world.size]
        with run.whole():
            engine.update()
            greedy = SamplingParams(run.args.max_gen_len, temperature=0)
            answers = engine.generate(own, [greedy] * len(own)) if own else []
        scores = rewards.score(own, answers) if own else torch.zeros(0, len(rewards.names))
        scores = torch.cat(run.world.gather(scores))
        means = dict(zip(rewards.names, scores.mean(0).tolist(), strict=True))
        return {"val_reward": float(rewards.total(scores).mean()), **{f"val_{name}": x for name, x in means.items()}}
    return validate


def colorize_advantages(tokenizer: ChatTokenizer, batch: dict[str, Tensor], number: int) -> str:
    """The sampled tokens of trajectory `number` for a terminal: green where the advantage is above 0, red below."""
    inside = batch["document"] == number
    advantages, pieces = batch["advantage"][inside].tolist(), []
    for token, advantage in zip(batch["targets"][inside].tolist(), advantages, strict=True):
        shade = 40 + int(160 * min(abs(advantage), 2) / 2)
        red, green = (0, shade) if advantage > 0 else (shade, 0)
        text = tokenizer.decode([token], keep_special_tokens=True).replace("\n", "⏎")
        pieces.append(f"\x1b[48;2;{red};{green};0m{text}\x1b[0m")
    return f"{sum(advantages) / max(len(advantages), 1):+.2f} " + "".join(pieces)
