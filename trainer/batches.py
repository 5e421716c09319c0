"""What each step learns from. Here: the rows of a data set, in an order that depends on the seed alone."""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from dataset.token_cache import TokenDataset
from model.cli import UserError
from trainer.distributed import World


class Step(NamedTuple):
    """What one optimizer step learns from."""

    batches: Iterable[dict[str, torch.Tensor]]  # this rank's micro-batches, as many on every rank
    grad_accum_steps: int  # their number
    num_items: int  # what the loss is divided by: supervised tokens, pairs, … of all ranks
    tokens: int  # useful ones, of all ranks
    metrics: dict[str, float] = {}  # what else to log


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def places(begin: int, count: int, seed: int, size: int) -> np.ndarray:
    """Which of `size` things come at begin … begin + count of an endless stream: one permutation after the other."""
    epochs, inside = np.divmod(np.arange(begin, begin + count), size)
    return np.concatenate([permutation(seed, epoch, size)[inside[epochs == epoch]] for epoch in np.unique(epochs)])


class RowStream:
    """The rows of a data set, G = batch_size × accumulation_steps a step.

    Step s takes rows [s·G, (s+1)·G) of an endless stream, whatever the number of ranks, and every step is whole.
    """

    at_boundary = True  # a run may stop and be saved after any step

    def __init__(self, dataset: TokenDataset, args, world: World):
        self.dataset, self.seed, self.world = dataset, args.seed, world
        self.rows_per_step = args.batch_size * args.accumulation_steps
        if self.rows_per_step % world.size:
            raise UserError(f"a step of {self.rows_per_step} rows (--batch_size x --accumulation_steps) cannot be "
                            f"shared evenly by {world.size} ranks")
        rows = self.rows_per_step // world.size
        self.micro_steps = next(n for n in range(-(-rows // args.batch_size), rows + 1) if rows % n == 0)
        self.steps = math.ceil(args.epochs * len(dataset) / self.rows_per_step)
        self.length = dataset.row_length  # positions of a row
        self.settings = {"rows_per_step": self.rows_per_step, "data": dataset.key, "packing": args.packing}

    def __str__(self) -> str:
        return f"{self.rows_per_step} rows a step"

    def take(self, step: int) -> Step:
        """What step `step` learns from."""
        rows = self.rows(step)
        mine = rows.reshape(self.micro_steps, self.world.size, -1)[:, self.world.rank]
        return Step((self.dataset.batch(part) for part in mine), self.micro_steps,
                    int(self.dataset.loss_count[rows].sum()), int(self.dataset.num_tokens[rows].sum()))

    def rows(self, step: int) -> np.ndarray:
        """The rows of step `step`, of all ranks."""
        return places(step * self.rows_per_step, self.rows_per_step, self.seed, len(self.dataset))

    def epoch(self, step: int) -> float:
        """How often the data have been seen before step `step`."""
        return step * self.rows_per_step / len(self.dataset)

    def state_dict(self) -> dict:
        """What the next step depends on beside its number: nothing."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
