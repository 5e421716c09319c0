"""What a card computes, and how fast: the first thing to run on a new one. About six minutes, useful from 8 GB on.

Every kernel and path is compared with its reference, the same code on the CPU in fp32, and the kernel that PyTorch
chose is named. Then training, decoding and online RL of the 64 M model are measured, against the plain recipe and
against transformers. A check that fails is reported, and the next one runs. The tables go to
benchmarks/results/gpu_check_{card}.json, and as Markdown to the terminal.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --only kernels steps engine       # one minute, no speeds
"""

import copy
import random
import re
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import decode_speed, rl_speed, train_speed
from benchmarks.machine import clock, model_config, model_parser, random_prompt, save_result, write_full_rows
from dataset.packing import Rows, collate
from dataset.prefix_sharing import pack_shared_prefix
from model.attention import BatchLayout, attention, has_flash, padding_mask
from model.cli import Failure, first_line, positive_int, run_main
from model.device import choose_device, inference_dtype, training_dtype
from model.inference.engine import Engine, SamplingParams, Sequence
from model.inference.sampling import sample
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, RMSNorm
from model.moe import Experts, has_grouped_mm
from trainer.flops import peak_flops
from trainer.losses import next_token_loss
from trainer.optimizer import make_optimizers
from trainer.parallel import checkpoint_blocks

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP32: 1e-4, FP16: 5e-3, BF16: 3e-2}  # of ‖ours - reference‖ / ‖reference‖
# the operators among which PyTorch chooses by device, dtype and shape
KERNELS = re.compile("scaled_dot_product.*attention|varlen_attn|grouped_mm|bmm|fused_rms_norm")
Row = dict[str, object]


class Report:
    """The rows of each table; `check` adds one whatever happens."""

    def __init__(self):
        self.tables: dict[str, list[Row]] = {}
        self.num_failures = 0

    def check(self, table: str, name: str, work: Callable[[], Row]) -> None:
        """Add what `work` returns to `table`: a row with "ok" False, or an exception, is a failure."""
        start = time.perf_counter()
        try:
            row = work()
        except Exception as error:  # any: the next check may tell more
            row = {"ok": False, "error": f"{type(error).__name__}: {first_line(error)}"}
        self.num_failures += not row.get("ok", True)
        self.tables.setdefault(table, []).append({"what": name, **row, "check_s": time.perf_counter() - start})
        print(f"{table:9} {name:46}", *(f"{key} {show(value)} " for key, value in row.items()), flush=True)

    def markdown(self) -> str:
        lines = []
        for table, rows in self.tables.items():
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "check_s"))
            lines += [f"### {table}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(show(row.get(column, '')) for column in columns)} |" for row in rows] + [""]
        return "\n".join(lines)


def show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def difference(ours: Tensor, reference: Tensor) -> float:
    """‖ours - reference‖ / ‖reference‖"""
    reference = reference.detach().float().cpu()
    return ((ours.detach().float().cpu() - reference).norm() / reference.norm()).item()


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    work()
    start = clock(device)
    for _ in range(repeats):
        work()
    return (clock(device) - start) / repeats * 1e3


class OperatorRecorder(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0].strip("_"))
        return function(*args, **(kwargs or {}))


def chosen_kernels(work: Callable[[], object]) -> str:
    """The operators that PyTorch chose for `work`."""
    with OperatorRecorder() as dispatched:
        work()
    return ", ".join(name for name in dict.fromkeys(dispatched.names) if KERNELS.match(name))


def compare(run: Callable[..., Tensor], inputs: list[Tensor], device: torch.device, dtype: torch.dtype,
            backward: bool = True, autocast: bool = False) -> Row:
    """`run(*inputs)` on the device in `dtype` against the CPU in fp32, with the gradients of all inputs."""
    inputs = [x.to(dtype).float() for x in inputs]  # the rounding of inputs is no error
    tensors = {place: [x.to(place, FP32 if autocast or place == "cpu" else dtype).requires_grad_(backward)
                       for x in inputs] for place in ("cpu", device)}

    def work(place: str | torch.device) -> list[Tensor]:
        with torch.autocast(device.type, dtype, enabled=autocast and place != "cpu"):
            output = run(*tensors[place])
        if not backward:
            return [output]
        weight = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
        return [output, *torch.autograd.grad((output * weight).sum(), tensors[place])]

    error = max(map(difference, work(device), work("cpu")))
    return {"chosen": chosen_kernels(lambda: work(device)), "error": error,
            "ms": milliseconds(lambda: work(device), device), "ok": error < TOLERANCE[dtype]}


# -- kernels -----------------------------------------------------------------------------------------------------------


def packed_batch(num_rows: int, length: int, documents: int = 5) -> dict[str, Tensor]:
    """Rows of short documents of random tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, length // documents, (num_rows, documents)).astype(np.int32)
    starts = np.concatenate(([0], (lengths.ravel() + 1).cumsum()))
    tokens = rng.integers(36, 6400, starts[-1]).astype(np.uint16)
    rows = Rows(starts[:-1], lengths.ravel(), np.arange(num_rows + 1) * documents)
    return collate(rows, np.arange(num_rows), tokens, None, length, documents)


def attention_layouts() -> Iterator[tuple[str, int, int, BatchLayout]]:
    """Name, number of rows, queries per row (one when decoding), and layout."""
    yield "whole rows", 4, 256, BatchLayout()
    mask = torch.ones(4, 256, dtype=torch.long)
    mask[0, :100] = 0
    yield "padded rows", 4, 256, BatchLayout(padding_mask(mask, 256))
    yield "packed documents", 4, 256, BatchLayout(cu_seqlens=packed_batch(4, 256)["cu_seqlens"])
    group = pack_shared_prefix([(range(40), [range(20), range(30)])] * 2, 256)
    yield "documents with a shared prompt", *group["input_ids"].shape, BatchLayout(
        **{name: group[name] for name in ("cu_seqlens", "expand_index", "gather_index")})
    all_keys = padding_mask(torch.ones(8, 128, dtype=torch.long), 1)
    yield "decoding", 8, 1, BatchLayout(all_keys)
    yield "decoding, shared prompt", 8, 1, BatchLayout(all_keys, shared_prefix_len=64)


def attention_row(num_rows: int, num_queries: int, layout: BatchLayout, head_dim: int, device: torch.device,
                  dtype: torch.dtype) -> Row:
    layouts = {"cpu": layout, device.type: BatchLayout(*(x.to(device) if isinstance(x, Tensor) else x for x in layout))}
    num_keys = num_queries if layout.mask is None else layout.mask.shape[-1]
    q = torch.randn(num_rows, num_queries, 8, head_dim)
    k, v = (torch.randn(num_rows, num_keys, 4, head_dim) for _ in range(2))
    prefix_len = layout.shared_prefix_len
    k, v = (torch.cat((x[:1, :prefix_len].expand(num_rows, -1, -1, -1), x[:, prefix_len:]), 1) for x in (k, v))
    return compare(lambda q, k, v: attention(q, k, v, layouts[q.device.type]), [q, k, v], device, dtype,
                   backward=num_queries > 1)


def experts_row(num_tokens: int, device: torch.device, dtype: torch.dtype) -> Row:
    experts = Experts(4, 256, 320)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.05)
    copies = {"cpu": experts, device.type: copy.deepcopy(experts).to(device)}
    expert_NK = torch.randint(4, (num_tokens, 1))
    return compare(lambda x, weight: copies[x.device.type](x, expert_NK.to(x.device), weight),
                   [torch.randn(num_tokens, 256), torch.rand(num_tokens, 1)], device, dtype, autocast=dtype != FP32)


def norm_row(device: torch.device, dtype: torch.dtype) -> Row:
    """Of the heads of queries, with weights in fp32, as in training and in a rollout."""
    norm = RMSNorm(96, 1e-6)
    nn.init.normal_(norm.weight)
    norms = {"cpu": norm, device.type: copy.deepcopy(norm).to(device)}
    return compare(lambda x: norms[x.device.type](x), [torch.randn(4, 256, 8, 96)], device, dtype)


def sampling_row(device: torch.device) -> Row:
    """The same logits and random numbers give the same tokens."""
    logits, params = 3 * torch.randn(32, 6400), [SamplingParams(1, 0.8, 0.9, top_k=50) for _ in range(32)]
    u = torch.rand(32).tolist()
    ours, expected = (sample(logits.to(place), params, u)[0] for place in (device, "cpu"))
    num_equal = sum(map(int.__eq__, ours, expected))
    return {"error": 1 - num_equal / 32, "ms": milliseconds(lambda: sample(logits.to(device), params, u), device),
            "ok": num_equal >= 31}  # a number next to a bound may fall on its other side


def optimizer_row(name: str, device: torch.device) -> Row:
    """How far ten steps with the same gradients lead from the CPU's weights, as a share of the way."""
    torch.manual_seed(0)
    start = small_model(Namespace(use_moe=0, hidden_size=64, num_hidden_layers=2))
    ends = []
    for place in (device, "cpu"):
        model, generator = copy.deepcopy(start).to(place), torch.Generator().manual_seed(0)
        optimizers = make_optimizers(model, name, 1e-2, 0.1)
        for _ in range(10):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(place)
            for optimizer in optimizers:
                optimizer.step()
        ends.append(torch.cat([(p.cpu() - q).flatten() for p, q in
                               zip(model.parameters(), start.parameters(), strict=True)]))
    error = difference(*ends)
    return {"error": error, "ok": error < (1e-4 if name == "adamw" else 3e-2)}  # Muon orthogonalises in bf16


def check_kernels(report: Report, args: Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    dtypes = [FP32, FP16, *[BF16] * (training_dtype(device) == BF16)]
    for name, num_rows, num_queries, layout in attention_layouts():
        for head_dim in (96, 50) if num_queries > 1 else (96,):  # 50: no multiple of 8
            for dtype in dtypes:
                report.check("kernels", f"attention: {name}, heads of {head_dim}, {str(dtype)[6:]}", partial(
                    attention_row, num_rows, num_queries, layout, head_dim, device, dtype))
    for dtype in dtypes:
        report.check("kernels", f"RMSNorm, {str(dtype)[6:]}", partial(norm_row, device, dtype))
        for num_tokens in (32, 2048):
            report.check("kernels", f"4 experts, {num_tokens} tokens, {str(dtype)[6:]}",
                         partial(experts_row, num_tokens, device, dtype))
    report.check("kernels", "sampling", partial(sampling_row, device))
    for name in ("adamw", "muon"):
        report.check("kernels", f"ten steps of {name}", partial(optimizer_row, name, device))


# -- whole steps and answers -------------------------------------------------------------------------------------------


def small_model(args: Namespace, **options) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(args.hidden_size, args.num_hidden_layers, bool(args.use_moe), **options))


def step_row(args: Namespace, device: torch.device, compiled: bool = False, checkpointing: bool = False) -> Row:
    """Loss and gradients of packed rows in the precision of training; waits: how often the host waited."""
    torch._dynamo.reset()
    dtype, batch, model = training_dtype(device), packed_batch(4, 256), small_model(args)
    gradients, losses = [], []

    def step(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype = dtype) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != FP32):
            result = next_token_loss(model, batch)
        loss = result.loss_sum / len(batch["targets"]) + (0 if result.aux_loss is None else result.aux_loss)
        (loss * 1024).backward()  # as fp16's loss scaling does
        return loss

    on_device = copy.deepcopy(model).to(device)
    if compiled:
        for layer in on_device.model.layers:
            layer.compile(dynamic=False)
    if checkpointing:
        checkpoint_blocks(on_device)
    on_device_batch = {name: x.to(device) for name, x in batch.items()}
    for one, *inputs in ((on_device, on_device_batch), (model, batch, FP32)):
        losses.append(step(one, *inputs).item())
        gradients.append(torch.cat([p.grad.float().flatten().cpu() for p in one.parameters()]))
    error = difference(*gradients)
    return {"loss error": abs(losses[0] - losses[1]), "error": error,
            "ms": milliseconds(lambda: step(on_device, on_device_batch), device),
            "waits": num_waits(lambda: step(on_device, on_device_batch), device),
            "ok": error < 5 * TOLERANCE[dtype] and abs(losses[0] - losses[1]) < 0.02}


def num_waits(work: Callable[[], object], device: torch.device) -> int | str:
    """How often the host waits for the card."""
    if device.type != "cuda":
        return "-"
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def engine_row(args: Namespace, device: torch.device, dtype: torch.dtype) -> Row:
    """Greedy answers of requests of different lengths: their mean distance in nats from the CPU's log-probabilities.

    In half precision, beside what bf16 costs on the CPU: large random weights send tokens to other experts.
    """
    model = small_model(args, initializer_range=0.1).eval().requires_grad_(False)
    engine, start = Engine(copy.deepcopy(model).to(device, dtype), max_batch=8), clock(device)
    sequences = greedy_answers(engine)
    seconds, graphs = clock(device) - start, engine.runner.graphs
    error, agreement = distance_from(model, sequences)
    bound = {} if dtype == FP32 else {
        "bf16 on the CPU": distance_from(model, greedy_answers(Engine(copy.deepcopy(model).to(BF16), max_batch=8)))[0]}
    return {"chosen": f"CUDA graphs of {[*graphs._graphs]} requests" if graphs and graphs._graphs else "no graphs",
            "error": error, **bound, "CPU's choice": agreement, "ms": seconds * 1e3,
            "ok": error < (2 * bound["bf16 on the CPU"] if bound else 1e-4)}


def greedy_answers(engine: Engine) -> list[Sequence]:
    rng = random.Random(0)
    prompts = [random_prompt(rng, rng.randrange(3, 60)) for _ in range(12)]
    return list(engine.generate(prompts, [SamplingParams(64, temperature=0, stop_ids=()) for _ in prompts]))


def distance_from(model: nn.Module, sequences: list[Sequence]) -> tuple[float, float]:
    """Mean |log p - log p'| of the sampled tokens, and the share of them that is the likeliest token of `model`."""
    errors, likeliest = [], []
    for sequence in sequences:
        logits = model(torch.tensor([sequence.token_ids])).logits[0, len(sequence.prompt_ids) - 1:-1]
        log_p, ids = logits.log_softmax(-1), torch.tensor(sequence.completion_ids)
        errors.append(log_p.gather(1, ids[:, None])[:, 0] - torch.tensor(sequence.logprobs))
        likeliest.append(log_p.argmax(-1) == ids)
    return torch.cat(errors).abs().mean().item(), torch.cat(likeliest).float().mean().item()


STEPS = {"eager": {}, "checkpointing": {"checkpointing": True}, "compiled": {"compiled": True},
         "compiled, checkpointing": {"compiled": True, "checkpointing": True}}


def check_steps(report: Report, args: Namespace, device: torch.device) -> None:
    for use_moe in (0, 1):
        args = Namespace(**vars(args) | {"use_moe": use_moe})
        kind = "MoE" if use_moe else "dense"
        for name, flags in STEPS.items():
            report.check("steps", f"{kind}, {name}", partial(step_row, args, device, **flags))
        for dtype in dict.fromkeys((FP32, inference_dtype(device, bool(use_moe)))):
            report.check("answers", f"{kind}, {str(dtype)[6:]}", partial(engine_row, args, device, dtype))


# -- speed -------------------------------------------------------------------------------------------------------------


def check_training(report: Report, args: Namespace, device: torch.device) -> None:
    """Rows of 340 without padding, so that only the computing is compared."""
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        data_path = write_full_rows(Path(folder) / "pretrain.jsonl", num_rows=4096)
        for use_moe, batch_size in ((0, 32), (1, 32), *[(0, 128)] * (memory > 40)):
            run = Namespace(**vars(args) | {"stage": "pretrain", "data_path": data_path, "use_moe": use_moe,
                                            "batch_size": min(batch_size, args.batch_size), "warmup": args.steps // 2})
            run_folder = Path(folder) / f"{use_moe}_{batch_size}"
            recipes = {"default": partial(train_speed.default_recipe, run, run_folder),
                       "plain": partial(train_speed.plain_recipe, run),
                       "transformers": partial(train_speed.transformers_recipe, run)}
            for name, recipe in recipes.items():
                def work(recipe=recipe) -> Row:
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    return recipe()
                report.check("training", f"{'MoE' if use_moe else 'dense'}, {run.batch_size} rows, {name}", work)


def decoding_row(args: Namespace, device: torch.device, num_requests: int) -> Row:
    plain = small_model(args).eval().requires_grad_(False).to(device, FP16 if device.type == "cuda" else FP32)
    fast = copy.deepcopy(plain).to(inference_dtype(device, bool(args.use_moe)))
    rng = random.Random(0)
    requests = [(random_prompt(rng, 64), args.tokens) for _ in range(num_requests)]
    result = decode_speed.compare("", requests, plain, fast, args, at_once=True)
    return {key: value for key, value in result.items() if key != "all"}


def check_decoding(report: Report, args: Namespace, device: torch.device) -> None:
    for use_moe in (0, 1):
        size = Namespace(**vars(args) | {"use_moe": use_moe})
        for num_requests in (1, 32, 256):
            report.check("decoding", f"{'MoE' if use_moe else 'dense'}, {num_requests} at once, tokens/s",
                         partial(decoding_row, size, device, num_requests))


def check_rl(report: Report, args: Namespace, device: torch.device) -> None:
    def work() -> Row:
        result = rl_speed.compare_steps(model_config(args), 48, args.repeats, random.Random(0), device)
        return {key: value for key, value in result.items() if isinstance(value, float)} | result["ratios"]
    report.check("rl", "48 answers, tokens/s", work)


CHECKS = {"kernels": check_kernels, "steps": check_steps, "training": check_training, "decoding": check_decoding,
          "rl": check_rl}


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS], help="these tables")
    parser.add_argument("--batch_size", type=positive_int, default=128, help="most rows per training step")
    parser.add_argument("--steps", type=positive_int, default=20, help="training steps to measure")
    parser.add_argument("--tokens", type=positive_int, default=128, help="tokens per answer")
    parser.add_argument("--repeats", type=positive_int, default=2, help="repeats of decoding and RL")
    args = parser.parse_args()
    args.compile, args.graphs = 0, 1  # of `decode_speed.compare`
    device, report = choose_device(args.device), Report()
    args.device = str(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    half = inference_dtype(device)
    about = {"device": name, "training": str(training_dtype(device))[6:], "inference": str(half)[6:],
             "TFLOP/s of a product": peak_flops(device, training_dtype(device)) / 1e12}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"capability": f"{properties.major}.{properties.minor}", "memory_gb": properties.total_memory / 1e9,
                  "flash attention": has_flash(device, half, 96), "grouped_mm": has_grouped_mm()}
    report.check("card", name, lambda: about)
    for check in args.only:
        CHECKS[check](report, args, device)
        save_result(f"gpu_check_{re.sub(r'[^a-z0-9]+', '_', name.lower())}",  # whatever becomes of the next one
                    {"tables": report.tables, "markdown": report.markdown()})
    print(f"\n{report.markdown()}")
    if report.num_failures:
        raise Failure(f"checks that failed: {report.num_failures}, marked **NO** above")


if __name__ == "__main__":
    run_main(main)
