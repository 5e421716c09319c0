"""Checks of the CUDA paths on a CUDA device without a device: see test_cuda_null.py.

A null device answers PyTorch's CUDA build for any compute capability; `real.Real()` computes its results on the CPU.
"""

import ctypes
import io
import os
import random
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import numpy as np
import real
import torch
from lab import TOKENIZER, Lab, write_rows
from torch._decomp import decomposition_table
from torch._dynamo.utils import counters

from dataset.packing import Rows, collate
from model.device import choose_device, peak_memory, training_dtype
from model.inference.constraints import regex_rule, text_grammar
from model.inference.engine import Engine, SamplingParams, Sequence
from model.model_lora import TARGETS, LoRAConfig, apply_lora, find_target_modules
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import train_dpo, train_grpo, train_pretrain
from trainer.losses import next_token_loss
from trainer.optimizer import make_optimizers
from trainer.parallel import checkpoint_blocks

for operator in (torch.ops.aten._fused_rms_norm.default, torch.ops.aten._fused_rms_norm_backward.default):
    real.SPECIAL[operator._schema.name] = decomposition_table[operator]  # which a CPU has no kernel for

NULL = ctypes.CDLL(os.environ["NULLCUDA_LIB"])
DEVICE = choose_device("cuda")
HAS_GROUPED_MM = torch.cuda.get_device_capability()[0] in (9, 10)


def num_syncs() -> int:
    return NULL.nullcuda_get(1)


def small_model(lora: bool = False, **options) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{"hidden_size": 64, "num_hidden_layers": 2, **options}))
    if lora:
        targets = tuple(name for name in TARGETS if name in find_target_modules(model))
        apply_lora(model, LoRAConfig(rank=4, targets=targets))
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


def serve(model: MiniMindForCausalLM, graphs: bool) -> tuple[Engine, list[Sequence], list[int]]:
    """Requests that come while others are answered. → the engine, the answers, and the waits of the decoding steps"""
    rng, syncs, sequences = random.Random(1), [], []
    engine = Engine(model, max_batch=4, graphs=graphs)
    waiting = [([rng.randrange(36, 6400) for _ in range(rng.randrange(3, 40))],
                SamplingParams(rng.randrange(5, 70), rng.choice([0, 1.0]), 0.9, seed=i, stop_ids=(),
                               grammar=text_grammar(TOKENIZER, regex_rule("[a-z ]+")) if i % 3 else None))
               for i in range(9)]
    while waiting or engine.busy:
        num_requests = len(sequences)
        if waiting and rng.random() < 0.2:
            sequences.append(engine.add(*waiting.pop(0)))
        before = num_syncs()
        engine.step()
        if engine.busy and len(sequences) == num_requests:
            syncs.append(num_syncs() - before)
    return engine, sequences, syncs


def check_engine(dtype: torch.dtype, **options) -> None:
    """Steps replayed from graphs answer as the CPU does, cast no weight, and wait for the ids that they sampled."""
    model = small_model(initializer_range=0.3, **options).eval().requires_grad_(False)
    expected = serve(model, graphs=False)[1]
    real.records.clear()
    with real.Real(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        engine, answers, syncs = serve(model.to(DEVICE), graphs=True)
    pairs = list(zip(answers, expected, strict=True))
    same = sum(ours.completion_ids == theirs.completion_ids for ours, theirs in pairs)
    differences = [abs(ours.logprobs[0] - theirs.logprobs[0]) for ours, theirs in pairs
                   if ours.completion_ids[0] == theirs.completion_ids[0]]
    graphs = engine.runner.graphs._graphs
    print(f"engine {dtype} {options}: {same} of {len(pairs)} answers are the CPU's, first tokens differ by at most "
          f"{max(differences):.4f} nats in {len(differences)}, graphs of {[*graphs]}, {len(engine.runner.prepacked)} "
          f"weights cast once, waits of a step: {Counter(syncs).most_common()}")
    assert not real.missing and not engine.runner.graphs._is_refused and len(graphs) >= 2, real.missing
    assert Counter(syncs).most_common()[0][0] == 2  # the ids come, the next ones go
    if dtype == torch.float32:
        assert same == len(pairs) and not engine.runner.prepacked
    else:
        assert len(differences) >= 3 and max(differences) < 0.1 and engine.runner.prepacked


def check_memory() -> None:
    """A step of the published size and batch."""
    model, batch = MiniMindForCausalLM().to(DEVICE), {name: x.to(DEVICE) for name, x in packed_rows(32, 340).items()}
    optimizer, = make_optimizers(model, "adamw", 1e-3, 0.0)
    for _ in range(2):
        step(model, optimizer, batch)
    print(f"64 M, 32 rows of 340: {peak_memory(DEVICE):.2f} GB")
    assert peak_memory(DEVICE) < 7


def check_stages() -> None:
    """Stages in fp32 have the losses of a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        flags = {"max_steps": 2, "use_compile": 0, "save_weight": "trained"}
        for stage, more in ((train_pretrain, {}), (train_dpo, {}), (train_grpo, {"max_gen_len": 24})):
            losses = []
            for device in ("cpu", "cuda"):
                lab = Lab(Path(folder), Path(folder) / f"{stage.__name__}_{device}")
                more = more if stage is train_pretrain else {**more, "from_weight": "full_sft"}
                lab.with_base()
                with real.Real() if device == "cuda" else nullcontext(), redirect_stdout(io.StringIO()), \
                        mock.patch("trainer.trainer.peak_flops", lambda *_: 1.0):
                    lab.train(stage, device=device, **flags, **more)
                losses.append(lab.losses("trained_64"))
            print(f"{stage.__name__}: losses {losses[1]}, on a CPU {losses[0]}")
            assert np.allclose(*losses, atol=1e-4) and not real.missing, real.missing


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    check_memory()
    check_stages()
    for dtype in (torch.float32, training_dtype(DEVICE)):
        check_engine(dtype)
        check_engine(dtype, use_moe=True)
    for options in ({}, {"hidden_size": 96}, {"use_moe": True}, {"use_moe": True, "lora": True}):
        check_steps(**options)
    check_compiled(False)
    check_compiled(True)
