"""Where the time of a training step goes: the largest kernels, kinds of work, the wait for data, the gaps on a GPU.

The stage's own script with --use_compile 1, in this process, under torch.profiler. On CUDA every step also runs in the
sync debug mode: one wait of the host for the device inside a step ends the program with the line that waits.

    python benchmarks/profile_step.py --stage pretrain --data_path ../shared/data/pretrain_val.jsonl.gz
"""

import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import save_result
from benchmarks.train_speed import STAGES, default_flags, speed_parser
from model.cli import positive_int, run_main
from trainer.metrics import synchronise
from trainer.trainer import Training

KINDS = {"attention": "attention|flash|fmha",
         "matrix products": r"\b(mm|addmm|bmm|baddbmm|linear)\b|gemm|cutlass|sm\d+_",
         "optimizer": "adamw|foreach|multi_tensor", "cross-entropy": "nll|log_softmax|cross_entropy",
         "fused element-wise": "cpp_fused|triton", "copies and fills": "copy|fill|zero|memcpy|memset|to_copy"}


class Watch:
    """Profiles the steps from `warmup` to `warmup + steps` of a Training, and times its wait for data."""

    def __init__(self, warmup: int, steps: int):
        self.warmup, self.steps, self.waited, self.seconds = warmup, steps, 0.0, 0.0
        cuda = [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler, self.take_step = profile(activities=[ProfilerActivity.CPU, *cuda]), Training._take_step

    def step(self, training: Training) -> None:
        """Instead of Training._take_step."""
        cuda = training.device.type == "cuda"
        if training.step == self.warmup:
            take = training.stream.take
            training.stream.take = lambda step: (found := take(step))._replace(batches=self.timed(found.batches))
            synchronise(training.device)
            self.profiler.start()
            self.began = time.perf_counter()
        watched = training.step >= self.warmup
        if cuda and watched:
            torch.cuda.set_sync_debug_mode("error")
        self.take_step(training)
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        if training.step == self.warmup + self.steps:
            synchronise(training.device)
            self.seconds = time.perf_counter() - self.began
            self.profiler.stop()

    def timed(self, batches: Iterable[dict]) -> Iterator[dict]:
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name)), "the rest")


def main() -> None:
    parser = speed_parser(__doc__)
    parser.add_argument("--kernels", type=positive_int, default=5, help="so many of the largest (default: 5)")
    args = parser.parse_args()
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True  # else the fused kernels of a CPU have no name
    watch = Watch(args.warmup, args.steps)
    stage = import_module(STAGES[args.stage][1].removesuffix(".py").replace("/", "."))
    with tempfile.TemporaryDirectory() as folder:
        flags = default_flags(args, Path(folder), args.warmup + args.steps, args.warmup + args.steps)
        with mock.patch.object(Training, "_take_step", lambda training: watch.step(training)), \
                mock.patch.object(sys, "argv", [stage.__file__, *flags]):
            stage.main()
    events = [(event.key, event.self_device_time_total or event.self_cpu_time_total, event.count)
              for event in watch.profiler.key_averages()]
    on_device = any(event.self_device_time_total for event in watch.profiler.key_averages())
    if on_device:  # what the host does beside is hidden behind it
        events = [(event.key, event.self_device_time_total, event.count) for event in watch.profiler.key_averages()]
    total, by_kind = sum(micros for _, micros, _ in events), defaultdict(float)
    for name, micros, _ in events:
        by_kind[kind_of(name)] += micros / total
    largest = sorted(events, key=lambda event: -event[1])[:args.kernels]
    found = {"seconds_a_step": watch.seconds / args.steps, "data_wait": watch.waited / watch.seconds,
             "device_gaps": 1 - total / 1e6 / watch.seconds if on_device else None, "kinds": dict(by_kind),
             "largest": [{"kernel": name, "share": micros / total, "calls_a_step": count / args.steps}
                         for name, micros, count in largest]}
    print(f"a step: {found['seconds_a_step']:.3f} s, waiting for data {found['data_wait']:.2%}, gaps between kernels "
          f"{'not measured' if found['device_gaps'] is None else format(found['device_gaps'], '.1%')}")
    for kind, part in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"  {part:6.1%} {kind}")
    for one in found["largest"]:
        print(f"  {one['share']:6.1%} {one['calls_a_step']:5.0f} calls  {one['kernel'][:90]}")
    name = f"profile_{args.stage}{'_moe' if args.use_moe else ''}_{args.hidden_size}x{args.num_hidden_layers}"
    save_result(name, found)


if __name__ == "__main__":
    run_main(main)
