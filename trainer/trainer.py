"""THE training loop: accumulate → clip → step → log → validate → save → stop. Every stage is its data and its loss.

A step takes batch_size × accumulation_steps rows, the same rows in the same order on any number of ranks, and its loss
is divided by the supervised tokens of all of them. Nothing in a step waits for the device.
"""

import ctypes
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.prompts import PromptDataset
from dataset.token_cache import TokenDataset
from model.chat import ChatTokenizer
from model.cli import Failure, UserError, first_line
from model.device import cpu_has_bfloat16
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindPreTrainedModel
from model.weights import file_stem, load_state, load_weight, save_weight
from trainer.batches import RowStream
from trainer.checkpoint import load_resume, random_state, restore_random_state, save_resume
from trainer.distributed import joined
from trainer.losses import Loss, inputs
from trainer.metrics import MetricsLog, Tracker, duration, flops_per_token, peak_flops, peak_memory
from trainer.optimizer import learning_rate, make_optimizers
from trainer.parallel import STRATEGIES, checkpoint_blocks

LossFunction = Callable[[nn.Module, dict[str, torch.Tensor]], Loss]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "use_moe", "norm_topk_prob")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


class Diverged(Failure):
    """The loss or a gradient is not a number any more."""


class Run:
    """One training run: device, ranks, precision, seed, logging, graceful stop. Used as a context."""

    def __init__(self, args):
        self.args = args
        self.stop_signal: int | None = None
        self.parallel = None  # how the model that is trained is shared by the ranks

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            self.world, self.device = stack.enter_context(joined(self.args.device))
            stack.enter_context(self._signals())
            self.dtype = self._precision()
            random.seed(self.args.seed)
            torch.manual_seed(self.args.seed)
            torch.set_float32_matmul_precision("high")  # TF32 where there is one
            if self.device.type == "cpu":
                keep_freed_memory()
            self.tokenizer = ChatTokenizer(self.args.tokenizer)
            if getattr(self.args, "num_workers", 0):
                os.environ["RAYON_NUM_THREADS"] = str(self.args.num_workers)
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._exit.__exit__(kind, error, trace)
        if isinstance(error, torch.OutOfMemoryError):
            raise Failure(f"{self.device} is out of memory: lower --batch_size and raise --accumulation_steps, which "
                          f"takes the same steps ({first_line(error)})") from error

    def say(self, text: str) -> None:
        if self.world.main:
            print(text, flush=True)

    # -- what a stage asks for -----------------------------------------------------------------------------------------

    def load_model(self) -> MiniMindForCausalLM:
        """The model of `--from_weight`, or a new one of the sizes asked for, the same on every rank."""
        args = self.args
        if args.from_weight == "none":
            sizes = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
            try:
                return MiniMindForCausalLM(MiniMindConfig(vocab_size=self.tokenizer.vocab_size, **sizes))
            except ValueError as error:
                raise UserError(str(error)) from None
        model, _ = load_weight(args.from_weight, args.save_dir, args.hidden_size, args.use_moe, self.tokenizer)
        for name in SIZES:
            if (wanted := getattr(args, name)) not in (None, getattr(model.config, name)):
                raise UserError(f"--{name} {wanted}, but weight {args.from_weight} has {getattr(model.config, name)}")
        return model

    def dataset(self, kind: type[TokenDataset], path: Path | None, **settings) -> TokenDataset | None:
        """The rows of `path`, tokenised once for all ranks of a machine; None without a path."""
        if path is None:
            return None
        args = self.args
        with self.world.main_first():
            began = time.perf_counter()
            data = kind(path, self.tokenizer, args.max_seq_len, bool(args.packing), bool(args.skip_bad_rows),
                        args.cache_dir, **settings)
        self.say(f"data: {path.name}: {data.meta['documents']:,} documents, {data.meta['tokens']:,} tokens in "
                 f"{len(data):,} rows of {data.row_length}, {data.utilization:.1%} full "
                 f"({time.perf_counter() - began:.1f} s)")
        for sentence in data.warnings:
            self.say(f"data: {sentence}")
        return data

    def prompts(self, path: Path | None) -> PromptDataset | None:
        """The prompts of `path` for online RL; None without a path."""
        if path is None:
            return None
        args = self.args
        found = PromptDataset(path, self.tokenizer, args.max_seq_len, bool(args.skip_bad_rows), args.thinking_ratio,
                              args.seed)
        self.say(f"data: {path.name}: {len(found):,} prompts")
        for sentence in found.warnings:
            self.say(f"data: {sentence}")
        return found

    def frozen(self, model: nn.Module) -> nn.Module:
        """`model` on the device, in evaluation mode, without gradients."""
        return self.prepare(model).eval().requires_grad_(False)

    def autocast(self):
        """The context of a forward pass: half precision where the machine has units for it."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def whole(self):
        """A context in which each rank may call the trained model as often as it likes; all of them enter it."""
        return self.parallel.whole() if self.parallel else nullcontext()

    def prepare(self, model: nn.Module) -> nn.Module:
        """`model` on the device, its blocks compiled if asked for."""
        self._compile(model)
        return model.to(self.device)

    def fit(self, model: nn.Module, data: TokenDataset | RowStream, loss_function: LossFunction,
            val_data: TokenDataset | None = None, val_loss: LossFunction | None = None,
            validate: Callable[[], dict] | None = None, save: Callable = save_weight,
            lr_scales: dict[str, float] | None = None, **settings) -> None:
        """Train what of `model` wants a gradient on `data` as the flags say, and stop early and clean when asked to.

        `data`: rows, or what has the methods of `RowStream`. `val_loss`: what is averaged over the validation rows (the
        next-token loss, with bits a byte); `validate`: what else to measure, "val_…". `save` writes a weight, called as
        `save_weight`. `lr_scales`: factors on the learning rate, by the beginning of a parameter's name. `settings`:
        what else must be the same when the run is resumed.
        """
        stream = RowStream(data, self.args, self.world) if isinstance(data, TokenDataset) else data
        Training(self, model, stream, loss_function, val_data, val_loss, validate, save, lr_scales, settings).run()

    # -- how it is done ------------------------------------------------------------------------------------------------

    def _compile(self, model: nn.Module) -> None:
        ours = isinstance(model, MiniMindPreTrainedModel)
        if self.args.use_compile and ours and model.model.layers[0]._compiled_call_impl is None:
            compile_blocks(model, self.device, self.say)

    def _precision(self) -> torch.dtype:
        wanted = getattr(torch, self.args.dtype)
        if self.device.type == "cpu" and wanted == torch.float16:
            raise UserError("--dtype float16 needs a GPU; use bfloat16 or float32 on a CPU")
        if self.device.type == "cpu" and wanted == torch.bfloat16 and not cpu_has_bfloat16():
            return torch.float32
        return wanted

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop after the step at hand; a second SIGINT stops at once."""
        def ask(number, _frame):
            if self.stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Exception:
            if self.world.size > 1:  # the launcher ends the other ranks of a failed one: each first says why it failed
                before[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Training:
    """The state of one `fit`: models, optimizers, place in the data, and what was counted since the last log line."""

    def __init__(self, run: Run, model: nn.Module, stream: RowStream, loss_function: LossFunction,
                 val_data: TokenDataset | None, val_loss: LossFunction | None, validate: Callable[[], dict] | None,
                 save: Callable, lr_scales: dict[str, float] | None, settings: dict):
        self.run_, self.args, self.world, self.device = run, run.args, run.world, run.device
        self.stream, self.val_data, self.loss_function = stream, val_data, loss_function
        self.val_loss, self.validate, self.save_weight = val_loss or self._text_loss, validate, save
        self.model = model
        self.stem = file_stem(run.args.save_weight, model.config)
        self.resume_path = run.args.checkpoint_dir / f"{self.stem}_resume.pth"
        self.step, self.tokens, self.best = 0, 0, math.inf
        names = ("epochs", "max_seq_len", "seed", "optimizer", "learning_rate")
        self.settings = {**stream.settings, **{name: getattr(run.args, name) for name in names}, **settings}
        state = self._load_state() if run.args.from_resume else None
        if run.args.activation_checkpointing:
            checkpoint_blocks(model)
        run._compile(model)
        self.parallel = run.parallel = STRATEGIES[run.args.parallel](run, model, partial(
            make_optimizers, name=run.args.optimizer, lr=run.args.learning_rate, weight_decay=run.args.weight_decay,
            muon_dtype=run.dtype, lr_scales=lr_scales))
        self.scaler = self.parallel.scaler
        tracker_id = self._resume(state) if state else None
        self.log = MetricsLog(run.args.save_dir / "logs" / f"{self.stem}.jsonl", self.step) if run.world.main else None
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(run.args).items()}
        self.facts = {"parent": run.args.from_weight, "flags": flags}
        self.tracker = Tracker(run.args.use_wandb and run.world.main, run.args.wandb_project, self.stem, flags,
                               run.args.save_dir / "logs", tracker_id)

    def run(self) -> None:
        args, say = self.args, self.run_.say
        last = self.stream.steps if not args.max_steps else min(self.stream.steps, args.max_steps)
        total = sum(p.numel() for p in self.parallel.plain.parameters())
        trained = sum(p.numel() for p in self.parallel.plain.parameters() if p.requires_grad)
        size = f"{f'{trained / 1e6:.2f} of ' if trained < total else ''}{total / 1e6:.2f} M parameters"
        say(f"train: {self.stem}, {size}, steps {self.step:,} to {last:,} of {self.stream.steps:,}, "
            f"{self.stream} on {self.world.size} x {self.device}, "
            f"{str(self.run_.dtype)[6:]}")
        if self.step >= last:
            say("train: nothing left to do")
            return
        self.peak = peak_flops(self.device, self.run_.dtype) * self.world.size
        self.flops = flops_per_token(self.parallel.plain, self.stream.length / 2)
        # online RL always: what could be done before is the measure of what is learned
        if not self.step and (self.validate or self._can_validate and args.eval_first):
            self._report_first(self._validate())
        self._start_interval()
        stopping = ending = save_due = False
        while not ending:
            self._take_step()
            whole = self.stream.at_boundary
            stopping |= self.world.any(self.run_.stop_signal is not None)
            ending = whole and (stopping or self.step >= last)
            validating = self._can_validate and (
                ending or (args.eval_interval and self.step % args.eval_interval == 0))
            row = self._measure() if ending or validating or self.step % args.log_interval == 0 else {}
            if validating:
                row |= self._validate()
            if row:
                self._report(row, last)
            if self._is_best(row):
                self._save_weight(f"{args.save_weight}_best", row)
            save_due |= ending or self.step % args.save_interval == 0
            if save_due and whole:
                self._save(row)
                save_due = False
            if row:
                self._start_interval()
        if stopping:
            say(f"train: stopped by signal {self.run_.stop_signal or ''} after step {self.step:,}; "
                "--from_resume 1 goes on")
        self.tracker.close()

    def _take_step(self) -> None:
        """One optimizer step over this rank's share of the global batch."""
        batches, micro_steps, units, tokens, noted = self.stream.take(self.step)
        warmup = math.ceil(self.args.warmup_ratio * self.stream.steps)
        self.lr = learning_rate(self.step, self.stream.steps, self.args.learning_rate, warmup)
        for optimizer in self.parallel.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * group["lr_scale"]
        for number, batch in enumerate(batches, 1):
            batch = to_device(batch, self.device)
            with self.parallel.accumulating(last=number == micro_steps):
                with self.run_.autocast():
                    loss = self.loss_function(self.parallel.wrapped, batch)
                # the wrapper averages over ranks, so a sum over all of them is multiplied by their number
                value = loss.loss_sum * (self.world.size / max(units, 1))
                if loss.aux_loss is not None:
                    value = value + loss.aux_loss / micro_steps
                self.parallel.backward(value)
            self.loss_sum += loss.loss_sum.detach()
            for name, value in loss.metrics.items():
                self.seen[name] = self.seen.get(name, 0) + value.detach()
        self.grad_norm = self.parallel.update(self.args.grad_clip or math.inf)
        self.healthy &= torch.isfinite(self.loss_sum)  # on the device: read when something is logged or saved
        if not self.scaler.is_enabled():
            self.healthy &= torch.isfinite(self.grad_norm)
        self.step += 1
        self.units += units
        for name, value in noted.items():
            self.noted.setdefault(name, []).append(value)
        self.tokens += tokens
        self.interval_tokens += tokens

    def _start_interval(self) -> None:
        self.began, self.began_step, self.interval_tokens, self.units = time.perf_counter(), self.step, 0, 0
        self.loss_sum, self.seen, self.noted = torch.zeros((), device=self.device), {}, {}
        self.healthy = torch.ones((), dtype=torch.bool, device=self.device)

    def _check(self) -> None:
        """Raise Diverged if a loss or gradient of this interval was not finite. Waits for the device."""
        if self.world.any(not bool(self.healthy)):
            raise Diverged(f"the loss or its gradient is not finite at or before step {self.step}; nothing was saved "
                           f"since ({self.resume_path.name} is intact). Lower --learning_rate, or look at the data")

    def _measure(self) -> dict:
        """The numbers of the steps since the last log line."""
        self._check()
        loss = float(self.world.sum(self.loss_sum)) / max(self.units, 1)
        seen = {name: float(self.world.sum(value)) / max(self.units, 1) for name, value in self.seen.items()}
        seconds = time.perf_counter() - self.began
        seen |= {name: sum(values) / len(values) for name, values in self.noted.items()}
        speed = self.interval_tokens / seconds
        self.seconds_per_step = seconds / max(self.step - self.began_step, 1)
        return {"step": self.step, "epoch": self.stream.epoch(self.step), "tokens": self.tokens, "loss": loss, **seen,
                "lr": self.lr, "grad_norm": float(self.grad_norm), "tokens_per_s": speed,
                "mfu": speed * self.flops / self.peak, "memory_gb": peak_memory(self.device)}

    @property
    def _can_validate(self) -> bool:
        return self.val_data is not None or self.validate is not None

    def _validate(self) -> dict:
        """What held-out rows say of the model."""
        return (self._validate_rows() if self.val_data is not None else {}) | (self.validate() if self.validate else {})

    def _is_best(self, row: dict) -> bool:
        """Whether this row's validation is the best so far: the highest val_reward, or the lowest val_loss."""
        score = -row["val_reward"] if "val_reward" in row else row.get("val_loss", math.inf)
        better = score < self.best
        self.best = min(score, self.best)
        return better

    @torch.no_grad()
    def _validate_rows(self) -> dict:
        """The mean of the validation loss, and of what it has seen, over the units of the validation rows."""
        data, B, sums = self.val_data, self.args.batch_size, {}
        self.model.eval()
        for begin in range(0, len(data), self.world.size * B):
            rows = begin + self.world.rank * B + np.arange(B)
            rows[rows >= len(data)] = -1  # whole batches, as many on every rank: all gather the shards
            with self.run_.autocast():
                loss = self.val_loss(self.model, to_device(data.batch(rows), self.device))
            for name, value in {"loss": loss.loss_sum, **loss.metrics}.items():
                sums[name] = sums.get(name, 0) + float(value)
        self.model.train()
        ranks = self.world.gather(sums)
        sums = {name: sum(rank.get(name, 0) for rank in ranks) for name in ranks[0]}
        nats, size = sums.pop("text_nats", 0), sums.pop("text_bytes", 0)
        bits = {"val_bpb": nats / max(size, 1) / math.log(2)} if size else {}
        return {f"val_{name}": value / max(int(data.loss_count.sum()), 1) for name, value in sums.items()} | bits

    def _text_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
        """Next-token loss; the nats of the text's tokens and the bytes these stand for are counted beside it."""
        logits = model(**inputs(batch)).logits
        nats = nn.functional.cross_entropy(logits.float(), batch["targets"], reduction="none").cpu().double()
        lengths = torch.tensor([0 if i < 36 else len(b) for i, b in enumerate(self.run_.tokenizer.token_bytes)])
        size = lengths[batch["targets"].cpu()]
        return Loss(nats.sum(), metrics={"text_nats": nats[size > 0].sum(), "text_bytes": size.sum()})

    def _report(self, row: dict, last: int) -> None:
        if not self.world.main:
            return
        parts = [f"{self.args.save_weight} {row['epoch']:.2f}/{self.args.epochs} step {self.step:,}/{last:,}",
                 f"loss {row['loss']:.4f} lr {row['lr']:.2e} norm {row['grad_norm']:.2f} "
                 f"{row['tokens_per_s']:,.0f} tok/s mfu {row['mfu']:.0%} {row['memory_gb']:.1f} GB "
                 f"eta {duration((last - self.step) * self.seconds_per_step)}"]
        parts += [" ".join(f"{name} {row[name]:.4f}" for name in names)
                  for names in ([*self.seen, *self.noted], [name for name in row if name.startswith("val_")]) if names]
        print(" · ".join(parts), flush=True)
        self.log.write(row)
        self.tracker.log(row)

    def _report_first(self, found: dict) -> None:
        """What held-out rows say before the first step."""
        if self.world.main:
            told = " ".join(f"{name} {value:.4f}" for name, value in found.items())
            print(f"{self.args.save_weight} before · {told}", flush=True)
            self.log.write({"step": 0, "epoch": 0.0, "tokens": 0, **found})

    def _save(self, row: dict) -> None:
        """Weights for use, and the state to resume from."""
        self._check()
        randomness, optimizers = self.world.gather(random_state()), self.parallel.optimizer_states()
        stream = self.stream.state_dict()
        model = self._save_weight(self.args.save_weight, row)
        if self.world.main:
            named = model.named_parameters(remove_duplicate=False)
            save_resume(self.resume_path, {
                "settings": self.settings, "step": self.step, "tokens": self.tokens, "best": self.best,
                "stream": stream, "scaler": self.scaler.state_dict(), "random": randomness,
                # what changes; the rest is in the parent's weight
                "model": {name: p.detach() for name, p in named if p.requires_grad},
                "optimizers": optimizers, "tracker": self.tracker.run_id,
            })

    def _save_weight(self, name: str, row: dict) -> nn.Module:
        model = self.parallel.gathered()
        if self.world.main:
            self.save_weight(model, name, self.args.save_dir, self.run_.tokenizer, **self.facts,
                             tokens_seen=self.tokens, step=self.step, metrics=row)
        return model

    def _load_state(self) -> dict | None:
        """The saved state, its weights taken up while the model is whole."""
        state = load_resume(self.resume_path, self.settings)
        if state is None:
            self.run_.say(f"resume: no {self.resume_path.name} yet, starting from the beginning")
        else:
            load_state(self.model, self.model.state_dict() | state["model"], self.resume_path)
        return state

    def _resume(self, state: dict) -> str | None:
        """Take up the rest of the state; → the tracker's run id."""
        self.parallel.load_optimizers(state["optimizers"])
        self.scaler.load_state_dict(state["scaler"])
        self.stream.load_state_dict(state["stream"])
        self.step, self.tokens, self.best = state["step"], state["tokens"], state["best"]
        if len(state["random"]) == self.world.size:
            restore_random_state(state["random"][self.world.rank])
        self.run_.say(f"resume: going on after step {self.step:,}")
        return state["tracker"]


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy without waiting: from pinned memory on CUDA."""
    if device.type == "cuda":
        return {key: value if value.is_cuda else value.pin_memory().to(device, non_blocking=True)
                for key, value in batch.items()}
    return {key: value.to(device) for key, value in batch.items()}


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of a step in the next one, not return it: the kernel clears each page it hands out.

    Measured: docs/experiments.md, "page faults". Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def compile_blocks(model: nn.Module, device: torch.device, say: Callable[[str], None]) -> None:
    """torch.compile each block in place (one compilation serves all); stay eager where no compiler works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        say(f"compile: not possible here, going on without ({type(error).__name__}: is a C++ compiler installed?)")
        return
    for layer in model.model.layers:
        layer.compile(dynamic=False)
