"""Checks of the CUDA paths on a CUDA device without a device: see test_cuda_null.py.

A null device answers PyTorch's CUDA build for any compute capability; `real.Real()` computes its results on the CPU.
"""

import ctypes
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import numpy as np
import real
import torch
from torch._dynamo.utils import counters

from dataset.packing import Rows, collate
from model.device import choose_device, training_dtype
from model.model_lora import TARGETS, LoRA, apply_lora, find_target_modules
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.losses import next_token_loss
from trainer.optimizer import make_optimizers
from trainer.parallel import checkpoint_blocks

NULL = ctypes.CDLL(os.environ["NULLCUDA_LIB"])
DEVICE = choose_device("cuda")
HAS_GROUPED_MM = torch.cuda.get_device_capability()[0] in (9, 10)


def num_syncs() -> int:
    return NULL.nullcuda_get(1)


def small_model(lora: bool = False, **options) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{"hidden_size": 64, "num_hidden_layers": 2, **options}))
    if lora:
        apply_lora(model, LoRA(rank=4, targets=tuple(name for name in TARGETS if name in find_target_modules(model))))
    return model


def packed_rows(rows: int, length: int, documents: int = 5) -> dict[str, torch.Tensor]:
    """Rows of short documents of random tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, length // documents, (rows, documents)).astype(np.int32)
    start = np.concatenate(([0], (lengths.ravel() + 1).cumsum()))
    tokens = rng.integers(36, 6400, start[-1]).astype(np.uint16)
    packed = Rows(start[:-1], lengths.ravel(), np.arange(rows + 1) * documents)
    return collate(packed, np.arange(rows), tokens, None, length, documents)


def step(model: MiniMindForCausalLM, optimizer: torch.optim.Optimizer, batch: dict) -> torch.Tensor:
    with torch.autocast("cuda", training_dtype(DEVICE)):
        loss = next_token_loss(model, batch, tag_weight=2.0).loss_sum / len(batch["targets"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def check_steps(**options) -> None:
    """Steps in the device's precision have the CPU's loss, and wait for the device once per layer of experts."""
    model, batch = small_model(**options), packed_rows(4, 128)
    expected = next_token_loss(model, batch).loss_sum.item() / len(batch["targets"])
    with real.Real():
        model, batch = model.to(DEVICE), {name: value.to(DEVICE) for name, value in batch.items()}
        optimizer, = make_optimizers(model, "adamw", 1e-3, 0.0)
        NULL.nullcuda_reset()
        loss, syncs = step(model, optimizer, batch), num_syncs()
        loss = loss.item()
    print(f"step {options}: loss {loss:.6f}, on a CPU {expected:.6f}, {syncs} syncs")
    assert abs(loss - expected) < 1e-3 and not real.missing, real.missing
    counted = options.get("use_moe") and (not HAS_GROUPED_MM or options.get("lora"))
    assert syncs == (2 if counted else 0)


def check_compiled(checkpointing: bool) -> None:
    """One graph for all blocks, also where they are checkpointed, and no wait for the device."""
    torch._dynamo.reset()
    counters.clear()
    model, batch = small_model().to(DEVICE), {name: x.to(DEVICE) for name, x in packed_rows(4, 128).items()}
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    if checkpointing:
        checkpoint_blocks(model)
    optimizer, = make_optimizers(model, "adamw", 1e-3, 0.0)
    for _ in range(3):
        NULL.nullcuda_reset()
        step(model, optimizer, batch)
    print(f"compiled, checkpointing {checkpointing}: {dict(counters['stats'])}, {dict(counters['graph_break'])}, "
          f"{num_syncs()} syncs, {NULL.nullcuda_get(0)} launches")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and num_syncs() == 0


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    for options in ({}, {"hidden_size": 96}, {"use_moe": True}, {"use_moe": True, "lora": True}):
        check_steps(**options)
    check_compiled(False)
    check_compiled(True)
