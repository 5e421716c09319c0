"""Processes that train together: the rank of this one, and collectives on the values of all."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from model.cli import Failure, UserError, first_line
from model.device import choose_device


@dataclass(frozen=True)
class World:
    """The rank of this process among all. A single process is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set; all ranks call it."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, group=control_group())
        return bool(votes)

    def gather(self, value: object) -> list:
        """Every rank's `value`, on every rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=control_group())
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A context that the first rank of each machine leaves before the others enter it (to fill a cache, say)."""
        if self.size > 1 and self.local_rank > 0:
            dist.barrier(control_group())
        try:
            yield
        finally:  # also after an error: else the others would wait forever
            if self.size > 1 and self.local_rank == 0:
                dist.barrier(control_group())


_control = None  # a gloo group beside nccl: a flag on the host must not wait for the GPU


def control_group() -> dist.ProcessGroup:
    return _control or dist.group.WORLD


@contextmanager
def init_distributed(device_name: str) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun or deepspeed started, if one did. → this rank and its device"""
    global _control
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(), choose_device(device_name)
        return
    rank, size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device_name.partition(":")[0] in ("auto", "cuda") and local_rank >= (num_gpus := torch.cuda.device_count()) > 0:
        raise UserError(f"rank {rank}: more processes than the {num_gpus} GPUs of this machine; start one per GPU, or "
                        "give --device cpu")
    device = choose_device(device_name.partition(":")[0], local_rank)  # cuda:1 would be one device for all ranks
    # The others wait while the first rank tokenises: for more than the default ten minutes when the file is large.
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE are set, as a launcher does, but {first_line(error)}; start with "
                        "torchrun, or unset RANK and WORLD_SIZE") from None
    _control = dist.new_group(backend="gloo", timeout=timedelta(hours=4)) if device.type == "cuda" else None
    try:
        yield World(rank, size, local_rank), device
    except RuntimeError as error:
        if size == 1 or not any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher terminates this rank too: print the error first
        raise Failure(f"rank {rank} lost its connection: no answer from {unresponsive_ranks(rank, size)} "
                      f"({first_line(error)}); --from_resume 1 continues from the last state") from None
    finally:
        _control = None
        dist.destroy_process_group()


def unresponsive_ranks(rank: int, size: int, timeout: float = 5.0) -> str:
    """The ranks that do not answer within `timeout` seconds. Every rank that has lost a connection calls it."""
    deadline = time.monotonic() + timeout
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"alive/{rank}", "yes")
    except RuntimeError:  # the store was in the first rank, if no launcher keeps one
        return "rank 0"
    missing = []
    for other in range(size):
        try:
            store.wait([f"alive/{other}"], timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
        except RuntimeError:
            missing.append(str(other))
    return f"rank {', '.join(missing) or '?'}"
