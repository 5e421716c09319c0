"""Trajectories → packed micro-batches, in which a prompt stands once for all of its answers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.packing import best_fit
from dataset.prefix_sharing import pack_shared_prefix
from model.chat import ChatTokenizer
from trainer.batches import GlobalBatch
from trainer.rl.trajectory import Trajectory


@dataclass
class PrefixGroup:
    """A prompt and answers to it that are computed together, by number."""

    prompt: list[int]
    members: list[int]
    num_tokens: int  # the prompt's once, and of each answer all but the last token, which predicts nothing


def group_by_prefix(trajectories: list[Trajectory], max_tokens: int) -> list[PrefixGroup]:
    """Answers to one prompt share a group as long as it has at most `max_tokens` tokens."""
    groups: list[PrefixGroup] = []
    latest: dict[tuple, PrefixGroup] = {}
    for number, trajectory in enumerate(trajectories):
        prompt, num_tokens = tuple(trajectory.prompt.ids), len(trajectory.completion_ids) - 1
        group = latest.get(prompt)
        if group is None or group.num_tokens + num_tokens > max_tokens:
            group = latest[prompt] = PrefixGroup(trajectory.prompt.ids, [], len(prompt))
            groups.append(group)
        group.members.append(number)
        group.num_tokens += num_tokens
    return groups


def pack_mini_batch(run, trajectories: list[Trajectory], indices: np.ndarray, max_tokens: int) -> GlobalBatch:
    """The trajectories `indices` of a rollout as one optimizer step on packed micro-batches of up to `max_tokens`.

    1. Answers to one prompt form groups. 2. Groups are packed into rows, best fit first. 3. Every rank takes every
    world.size-th row, so that all have equally many; a missing one is empty. 4. Each row becomes a micro-batch.
    """
    args, world, trajectories = run.args, run.world, [trajectories[i] for i in indices]
    if not args.use_compile:  # shapes need not be constant, so make rows that give every rank something to do
        max_tokens = min(max_tokens, -(-sum(len(trajectory.tokens) for trajectory in trajectories) // world.size))
    groups = group_by_prefix(trajectories, max_tokens)
    sizes = np.array([group.num_tokens for group in groups])
    max_tokens = max(max_tokens, int(sizes.max()))
    row_of = best_fit(sizes, max_tokens)
    num_rows = -(-(int(row_of.max()) + 1) // world.size) * world.size
    by_sequence = args.aggregation == "sequence"
    micro_batches = []
    for row in range(world.rank, num_rows, world.size):
        members = [groups[i] for i in np.flatnonzero(row_of == row)]
        num_tokens = sum(group.num_tokens for group in members)
        size = max_tokens if args.use_compile else -(-max(num_tokens, 1) // 64) * 64
        batch = pack_row(trajectories, members, size, by_sequence)
        batch["trajectory"] = torch.from_numpy(indices)[batch["trajectory"]]
        micro_batches.append({name: value.to(run.device) for name, value in batch.items()})
    num_items = len(trajectories) if by_sequence else sum(sum(trajectory.action_mask) for trajectory in trajectories)
    return GlobalBatch(micro_batches, len(micro_batches), num_items, int(sizes.sum()))


def pack_row(trajectories: list[Trajectory], groups: list[PrefixGroup], size: int, by_sequence: bool) -> dict:
    """One micro-batch of `size` positions: what `pack_shared_prefix` gives and, of each sampled token [M],

    `trajectory`: which of `trajectories` it belongs to, `document`: the same, counted within the micro-batch,
    `weight`: 1, or 1 / sampled tokens of its trajectory to average over sequences, `rollout_logprobs`: as sampled.
    """
    batch = pack_shared_prefix(
        [(group.prompt, [trajectories[i].completion_ids for i in group.members]) for group in groups], size)
    numbers = torch.tensor([i for group in groups for i in group.members], dtype=torch.int64)
    answers = [trajectories[i] for i in numbers]
    lengths = torch.tensor([len(answer.completion_ids) for answer in answers], dtype=torch.int64)
    weight = torch.tensor([1 / sum(answer.action_mask) if by_sequence else 1.0 for answer in answers])
    batch |= {"trajectory": numbers.repeat_interleave(lengths), "weight": weight.repeat_interleave(lengths),
              "document": torch.arange(len(answers)).repeat_interleave(lengths),
              "rollout_logprobs": torch.tensor([logprob for answer in answers for logprob in answer.logprobs])}
    is_action = torch.tensor([sampled for answer in answers for sampled in answer.action_mask], dtype=torch.bool)
    for name in ("logits_indices", "targets", "trajectory", "document", "weight", "rollout_logprobs"):
        batch[name] = batch[name][is_action]
    return batch


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
