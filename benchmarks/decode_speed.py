"""Decoded tokens per second: the engine against the plain loop, same model, same prompts, in one run.

Plain: benchmarks/plain.py, fp32 on a CPU, fp16 on CUDA. Engine: with its defaults, in the dtype of inference. Cases:
one request alone, 32 at once, 256 at once, and 32 different requests that arrive while others are answered (the plain
loop takes them one by one). Weights are random: speed does not depend on them. The two take turns, and the median of
the repeats counts. "constrained" instead compares the engine with itself: 32 at once, free and kept to a JSON schema.

    python benchmarks/decode_speed.py
    python benchmarks/decode_speed.py --use_moe 1
    python benchmarks/decode_speed.py --peer llama.cpp    # instead of the plain loop (pip install xllamacpp gguf)
    python benchmarks/decode_speed.py --profile   # instead: where the milliseconds of a step go
"""

import argparse
import operator
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks.machine import clock, model_config, model_parser, random_prompt, result_name, save_result
from benchmarks.plain import TEMPERATURE, TOP_P, plain_loop
from model.attention import attention
from model.chat import ChatTokenizer
from model.cli import Failure, positive_int, run_main
from model.device import choose_device, inference_dtype
from model.inference.constraints import Grammar, json_rule, text_grammar
from model.inference.engine import Engine, SamplingParams
from model.inference.prepacked import use_prepacked
from model.inference.sampling import sample
from model.inference.scheduler import Batch
from model.linear import linear
from model.model_minimind import MiniMindForCausalLM
from trainer.flops import peak_flops

Request = tuple[list[int], int]  # a prompt, and the tokens of its answer


# a list of records that never ends
RECORDS = {"type": "array", "minItems": 10_000, "items": {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False}}


def engine_run(engine: Engine, requests: list[Request], interval: int = 0, grammar: Grammar | None = None) -> None:
    """Answer requests, all at once or a new one every `interval` steps."""
    waiting, num_steps = list(requests), 0
    while waiting or engine.busy:
        while waiting and num_steps >= interval * (len(requests) - len(waiting)):
            prompt, num_tokens = waiting.pop(0)
            engine.add(prompt, SamplingParams(num_tokens, TEMPERATURE, TOP_P, seed=len(waiting), stop_ids=(),
                                              grammar=grammar))
        engine.step()
        num_steps += 1


def compare(name: str, requests: list[Request], plain: nn.Module, fast: nn.Module, args: argparse.Namespace,
            at_once: bool) -> dict:
    """Tokens/s of both on the same requests, in turn, `args.repeats` times after a warm-up."""
    speeds: dict[str, list[float]] = {"plain": [], "engine": []}
    engine = Engine(fast, max_batch=max(32, len(requests)), compile=bool(args.compile),
                    graphs=None if args.graphs else False)
    for repeat in range(args.repeats + 1):
        for kind in speeds:
            # the plain loop takes requests that arrive one by one: every fourth is enough to know its speed
            chosen = requests if at_once or kind == "engine" else requests[::4] or requests
            if repeat == 0:
                chosen = [(prompt, 4) for prompt, _ in chosen]
            start = time.perf_counter()
            if kind == "engine":
                engine.reset_prefix_cache()
                engine_run(engine, chosen, 0 if at_once else 2)
            elif at_once:
                plain_loop(plain, [prompt for prompt, _ in chosen], chosen[0][1])
            else:
                for prompt, num_tokens in chosen:
                    plain_loop(plain, [prompt], num_tokens)
            seconds = clock(plain.device) - start
            if repeat:
                speeds[kind].append(sum(num_tokens for _, num_tokens in chosen) / seconds)
    result = {kind: statistics.median(values) for kind, values in speeds.items()}
    result["ratio"] = result["engine"] / result["plain"]
    line = (f"{name:12} plain {result['plain']:8,.1f}   engine {result['engine']:8,.1f} tokens/s   "
            f"ratio {result['ratio']:5.2f}")
    if at_once:
        result["bandwidth_share"] = result["engine"] * bytes_per_token(fast, requests) / read_speed(fast.device)
        line += f"   {result['bandwidth_share']:.0%} of the speed at which memory is read"
    print(line, flush=True)
    return result | {"all": speeds}


def compare_llama_cpp(cases: dict[str, list[Request]], model: nn.Module, args: argparse.Namespace) -> dict:
    """Tokens/s of the engine and of llama.cpp with the same weights in f16 and q8_0, in turn, after a warm-up.

    llama.cpp answers over HTTP, each answer in one piece, so that next to nothing is lost there. The ratio is the
    median of the repeats' ratios: other programs then slow both sides.
    """
    import httpx

    from benchmarks.serve_load import llama_cpp_server
    from scripts.lib.gguf_file import write_gguf

    engine, results = Engine(model, max_batch=max(map(len, cases.values())), compile=bool(args.compile)), {}

    def answer(request: Request, url: str) -> None:
        body = {"prompt": request[0], "max_tokens": request[1], "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0,
                "min_p": 0, "ignore_eos": True, "cache_prompt": False}
        usage = httpx.post(f"{url}/completions", json=body, timeout=600).raise_for_status().json()["usage"]
        if usage["completion_tokens"] != request[1]:
            raise Failure(f"llama.cpp wrote {usage['completion_tokens']} tokens instead of {request[1]}")

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        urls = {}
        for dtype in ("f16", "q8_0"):
            path = Path(folder) / f"{dtype}.gguf"
            write_gguf(model, path, ChatTokenizer(), dtype)
            urls[dtype] = stack.enter_context(llama_cpp_server(path, engine.max_batch, args.prompt + args.tokens + 16))
        for name, requests in cases.items():
            speeds: dict[str, list[float]] = {kind: [] for kind in ("engine", *urls)}
            for repeat in range(args.repeats + 1):
                for kind, values in speeds.items():
                    engine.reset_prefix_cache()
                    start = time.perf_counter()
                    if kind == "engine":
                        engine_run(engine, requests)
                    else:
                        with ThreadPoolExecutor(len(requests)) as pool:
                            list(pool.map(answer, requests, [urls[kind]] * len(requests)))
                    if repeat:
                        values.append(sum(num for _, num in requests) / (time.perf_counter() - start))
            results[name] = {"engine": statistics.median(speeds["engine"]), "all": speeds}
            line = f"{name:12} engine {results[name]['engine']:8,.1f} tokens/s"
            for dtype in urls:
                ratio = statistics.median(map(operator.truediv, speeds["engine"], speeds[dtype]))
                results[name] |= {dtype: statistics.median(speeds[dtype]), f"ratio to {dtype}": ratio}
                line += f"   llama.cpp {dtype} {results[name][dtype]:8,.1f}   ratio {ratio:5.2f}"
            print(line, flush=True)
    return results


def compare_constrained(requests: list[Request], model: nn.Module, args: argparse.Namespace) -> dict:
    """Tokens/s of the same requests at once, free and kept to a schema, in turn, `args.repeats` times after a warm-up.
    """
    grammars = {"free": None, "constrained": text_grammar(ChatTokenizer(), json_rule(RECORDS))}
    speeds: dict[str, list[float]] = {kind: [] for kind in grammars}
    engine = Engine(model, max_batch=len(requests), compile=bool(args.compile), graphs=None if args.graphs else False)
    for repeat in range(args.repeats + 1):
        for kind, grammar in grammars.items():
            engine.reset_prefix_cache()
            start = clock(model.device)
            engine_run(engine, requests, grammar=grammar)
            if repeat:
                speeds[kind].append(sum(num for _, num in requests) / (clock(model.device) - start))
    result = {kind: statistics.median(values) for kind, values in speeds.items()}
    ratio = statistics.median(map(operator.truediv, speeds["constrained"], speeds["free"]))
    print(f"constrained  free {result['free']:8,.1f}   constrained {result['constrained']:8,.1f} tokens/s   "
          f"ratio {ratio:5.2f}", flush=True)
    return result | {"ratio": ratio, "all": speeds}


def bytes_per_token(model: nn.Module, requests: list[Request]) -> float:
    """What must be read for a token of requests that are answered together: its share of the weights, and its KV."""
    config = model.config
    mean_len = statistics.mean(len(prompt) + num_tokens / 2 for prompt, num_tokens in requests)
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * mean_len
    return sum(p.nbytes for p in model.parameters()) / len(requests) + kv * model.dtype.itemsize


def read_speed(device: torch.device) -> float:
    """Bytes per second of a long read of memory."""
    long = torch.randn(2**26, device=device)
    return long.nbytes / median_seconds(lambda: long.sum().item())


def median_seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """The median duration of `work`, after a warm-up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def timed(function: Callable, add_seconds: Callable[[float], None]) -> Callable:
    """The same function, which also reports how long each call took."""
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        add_seconds(time.perf_counter() - start)
        return result
    return wrapper


@torch.inference_mode()
def profile(model: nn.Module, prompts: list[list[int]], compile: bool) -> dict[str, float]:
    """Milliseconds of a decoding step of these sequences, after about 100 tokens, and the least it could take."""
    engine, sampling_seconds = Engine(model, max_batch=32, compile=compile), []
    for number, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(200, TEMPERATURE, TOP_P, seed=number, stop_ids=()))
    for _ in range(30):
        engine.step()
    result = {"step": median_seconds(engine.step)}
    with mock.patch("model.inference.engine.sample", timed(sample, sampling_seconds.append)), \
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(10):
            engine.step()
    result["attention"] = sum(event.self_cpu_time_total / 1e7 for event in trace.key_averages()
                              if "scaled_dot_product" in event.key)
    result["sampling"] = statistics.median(sampling_seconds)
    # a compiled step hides some of its products from the profiler: so they are done once more, by themselves
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {layer.in_features: torch.randn(len(prompts), layer.in_features, dtype=layer.weight.dtype)
              for layer in layers}

    def products() -> list[Tensor]:
        return [layer(inputs[layer.in_features]) for layer in layers]

    with use_prepacked(engine.runner.prepacked):
        result["products alone"] = median_seconds(products)
    result["the same, not packed"] = median_seconds(products)
    num_weights = sum(layer.weight.numel() for layer in layers)
    result["their FLOP at best"] = 2 * num_weights * len(prompts) / peak_flops(model.device, model.dtype)
    result["weights read once"] = sum(layer.weight.nbytes for layer in layers) / read_speed(model.device)
    return {name: 1000 * seconds for name, seconds in result.items()}


@torch.inference_mode()
def profile_on_gpu(model: nn.Module, prompts: list[list[int]], compile: bool) -> dict[str, float]:
    """Milliseconds of a decoding step of these sequences: until its tokens are there, and of all its kernels."""
    engine, num_steps = Engine(model, max_batch=max(32, len(prompts)), compile=compile), 10
    for number, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(200, TEMPERATURE, TOP_P, seed=number, stop_ids=()))
    for _ in range(30):  # the steps that compile and capture
        engine.step()
    result = {"step": 1000 * median_seconds(engine.step)}
    with torch.profiler.profile() as trace:
        for _ in range(num_steps):
            engine.step()
    kernels = [event for event in trace.key_averages() if event.device_type != DeviceType.CPU]
    result["kernels"] = sum(event.self_device_time_total for event in kernels) / 1000 / num_steps
    return result | {"number of kernels": sum(event.count for event in kernels) / num_steps}


@torch.inference_mode()
def profile_requests(model: nn.Module, requests: list[Request], interval: int) -> dict[str, dict]:
    """Where the seconds go of requests that arrive every `interval` steps, or all at once.

    "least": the products' FLOP at the speed of a large product, but at least the weights read once in each pass.
    """
    engine = Engine(model, max_batch=32)
    times, phase = {name: Counter() for name in ("prefill", "decode", "other")}, "other"
    tflops = peak_flops(model.device, model.dtype) / 1e12
    weight_seconds = sum(p.nbytes for p in model.parameters()) / read_speed(model.device)
    run = engine.runner.run

    def timed_part(part: str, function: Callable) -> Callable:
        return timed(function, lambda seconds: times[phase].update({part: seconds}))

    def counted_linear(x: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        times[phase]["TFLOP"] += 2e-12 * weight.numel() * x.numel() / x.shape[-1]
        return linear(x, weight, *args, **kwargs)

    def run_batch(batch: Batch) -> Tensor:
        nonlocal phase
        phase, widths = "decode" if batch.is_decode else "prefill", list(map(len, batch.chunks))
        counts, tflop = times[phase], times[phase]["TFLOP"]
        counts.update(passes=1, tokens=sum(widths), rows=len(widths) * max(widths))
        logits = timed_part("all", run)([batch])
        counts["least"] += max((counts["TFLOP"] - tflop) / tflops, weight_seconds)
        phase = "other"
        return logits

    products = timed_part("products", counted_linear)
    engine.runner.run = lambda batches: torch.cat(list(map(run_batch, batches)))
    engine.scheduler.schedule = timed_part("scheduling", engine.scheduler.schedule)
    engine.slots.free = timed_part("scheduling", engine.slots.free)
    with mock.patch("model.inference.engine.sample", timed_part("sampling", sample)), \
            mock.patch("model.linear.linear", products), mock.patch("model.moe.linear", products), \
            mock.patch("model.model_minimind.attention", timed_part("attention", attention)):
        start = time.perf_counter()
        engine_run(engine, requests, interval)
        times["other"]["all"] = time.perf_counter() - start - sum(parts["all"] for parts in times.values())
    return times


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--prompt", type=positive_int, default=64, help="tokens of a prompt (alone, at once)")
    parser.add_argument("--tokens", type=positive_int, default=128, help="tokens of an answer (alone, at once)")
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--cases", nargs="+", help="of alone, 'at once', arriving, '256 at once' (by default on a GPU "
                        "only) and constrained (default: all)")
    parser.add_argument("--compile", type=int, choices=(0, 1), default=0)
    parser.add_argument("--graphs", type=int, choices=(0, 1), default=1, help="decode by CUDA graphs where possible")
    parser.add_argument("--peer", choices=("llama.cpp",), help="compare with this instead, alone and at once, on a CPU")
    parser.add_argument("--profile", action="store_true", help="instead: where the time of a step goes")
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.peer and (device.type != "cpu" or args.profile):
        parser.error("--peer is for a CPU, without --profile")
    torch.manual_seed(0)
    config = model_config(args)
    plain = MiniMindForCausalLM(config).eval().requires_grad_(False).to(device)
    fast = MiniMindForCausalLM(config).eval().requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    fast.to(device, inference_dtype(device, config.use_moe))
    if device.type == "cuda":
        plain.half()
    rng = random.Random(0)
    # requests (prompt, tokens of the answer), and whether they come at once
    cases = {
        "alone": ([(random_prompt(rng, args.prompt), args.tokens)], True),
        "at once": ([(random_prompt(rng, args.prompt), args.tokens) for _ in range(32)], True),
        "arriving": ([(random_prompt(rng, rng.randint(16, 200)), rng.randint(32, 192)) for _ in range(32)], False),
        "256 at once": ([(random_prompt(rng, args.prompt), args.tokens) for _ in range(256)], True),
    }
    compiled = "_compiled" * args.compile
    if args.profile:
        on_gpu = device.type == "cuda"
        counts, profile_step = ((1, 32, 256), profile_on_gpu) if on_gpu else ((1, 8, 32), profile)
        results = {str(n): profile_step(fast, [random_prompt(rng, 64) for _ in range(n)], bool(args.compile))
                   for n in counts}
        print(f"{'sequences':20}", *(f"{n:8}" for n in counts))
        for part in results["1"]:
            print(f"{part:20}", *(f"{results[str(n)][part]:8.2f}" for n in counts),
                  "" if part.startswith("number") else "ms")
        if not args.compile and not on_gpu:  # compilation would hide what a pass is made of
            # as benchmarks/serve_load.py --rounds 1 --tokens 64
            clients = [(random_prompt(rng, 200), 64) for _ in range(32)]
            for name, requests, every in (("arriving", cases["arriving"][0], 2), ("32 clients", clients, 0)):
                results[name] = profile_requests(fast, requests, every)
                print(f"\n{name}, seconds", *(f"{phase:>12}" for phase in results[name]))
                for part in dict.fromkeys(part for times in results[name].values() for part in times):
                    print(f"{part:20}", *(f"{times[part]:12,.2f}" for times in results[name].values()))
        return save_result(result_name(f"decode_profile{compiled}", args), results)
    if args.peer:
        peer_cases = {name: requests for name, (requests, at_once) in cases.items() if at_once}
        if unknown := [name for name in args.cases or () if name not in peer_cases]:
            parser.error(f"--cases {unknown[0]}: with --peer there are {', '.join(peer_cases)}")
        peer_cases = {name: peer_cases[name] for name in args.cases or ("alone", "at once")}
        return save_result(result_name(f"decode_llama_cpp{compiled}", args),
                           compare_llama_cpp(peer_cases, fast, args))
    names = args.cases or [*(name for name in cases if device.type == "cuda" or "256" not in name), "constrained"]
    if unknown := [name for name in names if name not in {*cases, "constrained"}]:
        parser.error(f"--cases {unknown[0]}: there are {', '.join(cases)}, constrained")
    dtype = {"dtype": str(fast.dtype).removeprefix("torch.")}
    if "constrained" in names:
        names.remove("constrained")
        save_result(result_name(f"decode_constrained{compiled}", args),
                    dtype | compare_constrained(cases["at once"][0], fast, args))
    if not names:
        return
    results = {name: compare(name, cases[name][0], plain, fast, args, cases[name][1]) for name in names}
    save_result(result_name(f"decode_speed{compiled}", args), dtype | results)


if __name__ == "__main__":
    run_main(main)
