"""Where the time of a training step goes: the largest kernels, kinds of work, the wait for data, the gaps on a GPU.

The stage's own script with --use_compile 1, in this process, under torch.profiler. On CUDA every step also runs in the
sync debug mode: one wait of the host for the device inside a step ends the program at the line that waits.

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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import result_name, save_result
from benchmarks.train_speed import STAGES, default_flags, training_parser
from model.cli import positive_int, run_main
from model.device import synchronise
from trainer.batches import GlobalBatch
from trainer.trainer import Trainer

KINDS = {"attention": "attention|flash|fmha",
         "matrix products": r"\b(mm|addmm|bmm|baddbmm|linear)\b|gemm|cutlass|sm\d+_",
         "optimizer": "adamw|foreach|multi_tensor", "cross-entropy": "nll|log_softmax|cross_entropy",
         "fused element-wise": "cpp_fused|triton", "copies and fills": "copy|fill|zero|memcpy|memset|to_copy"}


class StepProfiler:
    """Profiles the steps from `warmup` to `warmup + num_steps` of a Trainer, and times its wait for data."""

    def __init__(self, warmup: int, num_steps: int):
        self.warmup, self.num_steps, self.data_seconds, self.seconds = warmup, num_steps, 0.0, 0.0
        cuda = [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler, self.original_fit = profile(activities=[ProfilerActivity.CPU, *cuda]), Trainer.fit

    def fit(self, trainer: Trainer) -> None:
        """Replaces Trainer.fit: a step starts with its next batch and ends with its optimizer step."""
        next_batch, optimizer_step = trainer.stream.next_batch, trainer.strategy.optimizer_step
        device = trainer.device

        def start_step(step: int) -> GlobalBatch:
            if step < self.warmup:
                return next_batch(step)
            if step == self.warmup:
                synchronise(device)
                self.profiler.start()
                self.start = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            batch = next_batch(step)
            return batch._replace(micro_batches=self._timed(batch.micro_batches))

        def end_step() -> None:
            optimizer_step()
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            if trainer.step + 1 == self.warmup + self.num_steps:
                synchronise(device)
                self.seconds = time.perf_counter() - self.start
                self.profiler.stop()

        trainer.stream.next_batch, trainer.strategy.optimizer_step = start_step, end_step
        self.original_fit(trainer)

    def _timed(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The same batches; `data_seconds` counts the wait for each."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "the rest")


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--kernels", type=positive_int, default=5, help="list this many of the largest (default: 5)")
    args = parser.parse_args()
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True  # else the fused kernels of a CPU have no name
    steps, stage = StepProfiler(args.warmup, args.steps), import_module(f"trainer.{STAGES[args.stage][1].stem}")
    with tempfile.TemporaryDirectory() as folder:
        num_steps = args.warmup + args.steps
        flags = default_flags(args, Path(folder), num_steps, num_steps) | {"save_dir": folder, "checkpoint_dir": folder}
        with mock.patch.object(Trainer, "fit", lambda trainer: steps.fit(trainer)), \
                mock.patch.object(sys, "argv", [stage.__file__, *(f"--{key}={value}" for key, value in flags.items())]):
            stage.main()
    events = steps.profiler.key_averages()
    on_device = any(event.self_device_time_total for event in events)  # it hides what the host does meanwhile
    kernels = [(event.key, event.self_device_time_total if on_device else event.self_cpu_time_total, event.count)
               for event in events if not on_device or event.device_type != DeviceType.CPU]  # who started it, too
    total, shares = sum(micros for _, micros, _ in kernels), defaultdict(float)
    for name, micros, _ in kernels:
        shares[kind_of(name)] += micros / total
    result = {"seconds_a_step": steps.seconds / args.steps, "data_wait": steps.data_seconds / steps.seconds,
              "device_gaps": 1 - total / 1e6 / steps.seconds if on_device else None, "kinds": dict(shares),
              "largest": [{"kernel": name, "share": micros / total, "calls_a_step": count / args.steps} for
                          name, micros, count in sorted(kernels, key=lambda kernel: -kernel[1])[:args.kernels]]}
    gaps = f"{result['device_gaps']:.1%}" if on_device else "not measured"
    print(f"per step: {result['seconds_a_step']:.3f} s, waiting for data {result['data_wait']:.2%}, "
          f"gaps between kernels {gaps}")
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {share:6.1%} {kind}")
    for kernel in result["largest"]:
        print(f"  {kernel['share']:6.1%} {kernel['calls_a_step']:5.0f} calls  {kernel['kernel'][:90]}")
    save_result(result_name(f"profile_{args.stage}", args), result)


if __name__ == "__main__":
    run_main(main)
