"""Speed beside other busy programs: the number of threads adapted and not, in turn, in one run.

Training: the model and the flags of the demo, on the sample world. Decoding: the 64 M model, one request and eight.
A busy program is an endless loop in Python.

    python benchmarks/busy_machine.py
    python benchmarks/busy_machine.py --work decoding
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
from torch import nn

from benchmarks.machine import random_prompt, save_result, train
from model.cli import Parser, nonneg_int, positive_int, run_main
from model.device import inference_dtype
from model.inference.engine import Engine, SamplingParams
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import ROOT

FLAGS = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_seq_len": 1024, "batch_size": 2, "accumulation_steps": 1, "optimizer": "muon", "learning_rate": 4e-3,
         "use_compile": 1, "epochs": 99, "log_interval": 10, "from_weight": "none", "device": "cpu"}


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Beside so many endless loops."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def training_speed(data: Path, adapt: int, steps: int) -> float:
    """Median tokens/s of the second half of the log lines: the first compiles, and chooses the threads."""
    with tempfile.TemporaryDirectory() as folder:
        flags = FLAGS | {"data_path": data, "cache_dir": data.parent, "max_steps": steps, "adapt_threads": adapt}
        rows, _ = train([ROOT / "trainer/train_pretrain.py"], flags, Path(folder))
    speeds = [row["tokens_per_s"] for row in rows]
    return statistics.median(speeds[len(speeds) // 2:])


def decoding_speed(model: nn.Module, num_requests: int, adapt: int, seconds: float) -> float:
    """Tokens/s of requests that are answered together, in the second half of the seconds."""
    num_threads = torch.get_num_threads()
    engine, rng = Engine(model, max_batch=num_requests, adapt_threads=bool(adapt)), random.Random(0)
    start, num_tokens = time.perf_counter(), 0
    try:
        while (now := time.perf_counter()) < start + seconds:
            if now < start + seconds / 2:
                half, num_tokens = now, 0
            if not engine.busy:
                engine.reset_prefix_cache()
                for _ in range(num_requests):
                    engine.add(random_prompt(rng, 64), SamplingParams(256, stop_ids=()))
            num_tokens += len(engine.step())
        return num_tokens / (time.perf_counter() - half)
    finally:
        torch.set_num_threads(num_threads)


def compare(name: str, speed: Callable[[int], float], all_busy: list[int]) -> dict[str, dict]:
    """`speed` with 0 and 1, whether threads are adapted, in turn beside so many busy programs."""
    results: dict[str, dict] = {}
    for num_busy in all_busy:
        with busy_programs(num_busy):
            fixed, adapted = speed(0), speed(1)
        results[str(num_busy)] = {"fixed": fixed, "adapted": adapted, "ratio": adapted / fixed}
        alone = results[str(all_busy[0])]["fixed"]
        print(f"{name}, {num_busy} busy programs: fixed {fixed:8,.0f} tokens/s ({fixed / alone:.2f} of that alone), "
              f"adapted {adapted:8,.0f} ({adapted / alone:.2f}), ratio {adapted / fixed:.2f}", flush=True)
    return results


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("training", "decoding"), default="training")
    parser.add_argument("--busy", type=nonneg_int, nargs="+", default=[0, 1, 2], help="busy programs beside")
    parser.add_argument("--steps", type=positive_int, help="of each training run (default: 120)")
    parser.add_argument("--seconds", type=positive_int, help="of each decoding run (default: 20)")
    parser.add_argument("--hidden_size", type=positive_int, help="of the decoding model (default: 768)")
    args = parser.parse_args()
    for name in ("steps",) if args.work == "decoding" else ("seconds", "hidden_size"):
        if getattr(args, name):
            parser.error(f"--{name} is not for --work {args.work}")
    if args.work == "decoding":
        torch.manual_seed(0)
        model = MiniMindForCausalLM(MiniMindConfig(args.hidden_size or 768)).eval().requires_grad_(False)
        model.to(inference_dtype(model.device, False))
        speeds = {f"{count} at once": partial(decoding_speed, model, count, seconds=args.seconds or 20)
                  for count in (1, 8)}
        return save_result("busy_machine_decoding", {name: compare(name, speed, args.busy)
                                                     for name, speed in speeds.items()})
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "dataset/sample_world.py", "--out", folder], check=True,
                       stdout=subprocess.DEVNULL)
        speed = partial(training_speed, Path(folder) / "pretrain.jsonl", steps=args.steps or 120)
        save_result("busy_machine", compare("training", speed, args.busy))


if __name__ == "__main__":
    run_main(main)
