"""The rows that each optimizer step learns from, in an order that depends on the seed alone."""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from dataset.token_cache import TokenDataset
from model.cli import UserError
from trainer.distributed import World

MAX_ROWS = 2**20  # of a step
MIN_STEPS = 20  # in an epoch of a small file, unless --batch_size or --accumulation_steps is given


class GlobalBatch(NamedTuple):
    """What one optimizer step learns from."""

    micro_batches: Iterable[dict[str, torch.Tensor]]  # of this rank, as many on every rank
    grad_accum_steps: int  # their number
    num_items: int  # what the loss is divided by: supervised tokens, pairs, … of all micro-batches and ranks
    num_tokens: int  # without padding, of all ranks
    metrics: dict[str, float] = {}  # what else to log


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the rows in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def sampler_indices(start: int, count: int, seed: int, size: int) -> np.ndarray:
    """Elements start … start + count of an endless stream of indices below `size`: one permutation after the other."""
    first, last = start // size, (start + count - 1) // size
    stream = np.concatenate([permutation(seed, epoch, size) for epoch in range(first, last + 1)])
    return stream[start - first * size:][:count]


def adapt_batch(num_rows: int, batch_size: int, accumulation_steps: int, world_size: int = 1) -> tuple[int, int]:
    """Lower accumulation_steps, then batch_size, until an epoch of `num_rows` rows has MIN_STEPS steps, if it can.

    People fine-tune on 20 to 500 short rows, which packing makes even fewer: with 32 rows per step that is a step
    or two.
    """
    rows_per_device = max(1, num_rows // (MIN_STEPS * world_size))
    return min(batch_size, rows_per_device), min(accumulation_steps, max(1, rows_per_device // batch_size))


def global_batch_size(args, world: World) -> int:
    """Rows (prompts) of one step, of all ranks: --global_batch_size, or batch_size × accumulation_steps per rank.

    Raises UserError when they are too many, or when the ranks cannot share them evenly.
    """
    size = args.global_batch_size or args.batch_size * args.accumulation_steps * world.size
    if size > MAX_ROWS:
        raise UserError(f"--batch_size {args.batch_size:,} x --accumulation_steps {args.accumulation_steps:,} on "
                        f"{world.size} ranks are more than {MAX_ROWS:,} rows per step; give less")
    if size % world.size:
        raise UserError(f"--global_batch_size {size} cannot be shared evenly by {world.size} ranks; "
                        f"{size // world.size * world.size or world.size} can")
    return size


class BatchStream:
    """The rows of a data set, `global_batch_size` per step.

    With G rows per step, step s takes elements [s·G, (s+1)·G) of `sampler_indices`, whatever the number of ranks.
    """

    can_checkpoint = True  # after every step

    def __init__(self, dataset: TokenDataset, args, world: World):
        self.dataset, self.seed, self.epochs, self.world = dataset, args.seed, args.epochs, world
        self.rows_per_step = global_batch_size(args, world)
        rows = self.rows_per_step // world.size
        self.grad_accum_steps = next(n for n in range(-(-rows // args.batch_size), rows + 1) if rows % n == 0)
        self.steps = math.ceil(args.epochs * len(dataset) / self.rows_per_step)
        self.length = dataset.row_length  # positions of a row
        self.settings = {"data_path": dataset.key, "packing": args.packing, "global_batch_size": self.rows_per_step}

    def __str__(self) -> str:
        return f"{self.rows_per_step} rows a step"

    def next_batch(self, step: int) -> GlobalBatch:
        rows = self.rows(step)
        micro_batches = rows.reshape(self.grad_accum_steps, self.world.size, -1)[:, self.world.rank]
        return GlobalBatch(map(self.dataset.batch, micro_batches), self.grad_accum_steps,
                           int(self.dataset.loss_count[rows].sum()), int(self.dataset.num_tokens[rows].sum()))

    def rows(self, step: int) -> np.ndarray:
        """The rows of step `step`, of all ranks."""
        return sampler_indices(step * self.rows_per_step, self.rows_per_step, self.seed, len(self.dataset))

    def epoch(self, step: int) -> float:
        """Passes over the data before step `step`, of which the last one may go on into the next."""
        return min(step * self.rows_per_step / len(self.dataset), self.epochs)

    def state_dict(self) -> dict:
        """What the next batch depends on beside the step: nothing."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy without waiting: from pinned memory on CUDA."""
    if device.type == "cuda":
        return {key: value if value.is_cuda else value.pin_memory().to(device, non_blocking=True)
                for key, value in batch.items()}
    return {key: value.to(device) for key, value in batch.items()}
