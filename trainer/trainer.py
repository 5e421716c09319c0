"""The training loop of every stage: read `Trainer.fit`.

A step takes `global_batch_size` rows, the same rows in the same order however many ranks share them, and its loss is
divided by the supervised tokens of all of them. No step waits for the device, except for --target_kl and the loss
scaling of fp16.
"""

import glob
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from dataset.token_cache import TokenDataset
from model.cli import Failure, UserError, first_line
from model.device import peak_memory
from model.loading import MODEL_SIZES
from model.weights import check_target, file_stem, load_state, save_weight, weight_kind, weight_name
from trainer.batches import BatchStream, to_device
from trainer.checkpoint import load_resume, random_state, restore_random_state, resume_name, save_resume
from trainer.flops import flops_per_token, peak_flops
from trainer.losses import Loss
from trainer.metrics import IntervalMetrics, MetricsLog, Tracker, duration
from trainer.optimizer import learning_rate, make_optimizers, set_learning_rate
from trainer.parallel import DDPStrategy, FSDPStrategy, checkpoint_blocks
from trainer.run import Run
from trainer.validation import byte_lengths, text_loss, validate_rows
from trainer.zero import DeepSpeedStrategy

STRATEGIES = {"ddp": DDPStrategy, "fsdp": FSDPStrategy, "deepspeed": DeepSpeedStrategy}
INPUTS = ("data_path", "from_weight", "from_teacher_weight")  # settings that are hashes of what these flags name
LossFunction = Callable[[nn.Module, dict[str, Tensor]], Loss]


class Diverged(Failure):
    """The loss or a gradient is not finite any more."""


class Trainer:
    """Trains the parameters of `model` that require gradients, as the flags of `run` say.

    stream: yields the global batch of each step (`BatchStream`, or `RolloutStream` for online RL).
    loss_fn: (model, micro-batch) → Loss.
    val_data, val_loss_fn: rows to validate on, and their loss (default: next-token loss, and bits per byte).
    validate: what else to measure, → {"val_…": number}.
    save_fn: writes weights, called as `save_weight`.
    lr_scales: factors on the learning rate, by the prefix of a parameter's name.
    settings: what else must be unchanged when the run is resumed, by the flag that it is known by.
    """

    def __init__(self, run: Run, model: nn.Module, stream: BatchStream, loss_fn: LossFunction,
                 val_data: TokenDataset | None = None, val_loss_fn: LossFunction | None = None,
                 validate: Callable[[], dict] | None = None, save_fn: Callable = save_weight,
                 lr_scales: dict[str, float] | None = None, settings: dict | None = None):
        args = run.args
        self.run, self.args, self.world, self.device = run, args, run.world, run.device
        self.model, self.stream, self.loss_fn = model, stream, loss_fn
        self.val_data, self.validate, self.save_fn = val_data, validate, save_fn
        self.val_loss_fn = val_loss_fn or partial(text_loss, byte_lengths=byte_lengths(run.tokenizer))
        self.step, self.tokens, self.best_score = 0, 0, math.inf
        self.last_step = min(stream.steps, args.max_steps or stream.steps)
        self.warmup_steps = math.ceil(args.warmup_ratio * stream.steps)
        self.run_name = file_stem(args.save_weight, model.config)
        names = [args.save_weight, f"{args.save_weight}_best"][:1 + bool(val_data or validate)]
        for name in names:
            check_target(args.save_dir / f"{file_stem(name, model.config)}.pth", model, run.sources)
        self.resume_path = args.checkpoint_dir / resume_name(args.save_weight, model.config)
        self.resume_path.parent.mkdir(parents=True, exist_ok=True)  # now, rather than after an hour
        fixed = ("max_seq_len", "seed", "optimizer", "learning_rate", "lr_schedule", "weight_decay")
        sizes = {name: getattr(model.config, name) for name in MODEL_SIZES}
        self.settings = {**stream.settings, **{name: getattr(args, name) for name in fixed}, **(settings or {}),
                         **sizes}
        self.inputs = {name: str(getattr(args, name)) for name in INPUTS if name in self.settings}
        state = self._load_weights() if args.from_resume else None
        run.compile(model)
        if args.activation_checkpointing:
            checkpoint_blocks(model)
        self.strategy = run.strategy = STRATEGIES[args.parallel](run, model, partial(
            make_optimizers, name=args.optimizer, lr=args.learning_rate, weight_decay=args.weight_decay,
            muon_dtype=run.dtype, lr_scales=lr_scales))
        tracker_id = self._resume(state) if state else None

        flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        self.metadata = {"parent": weight_name(args.from_weight), "flags": flags}
        log_dir = args.save_dir / "logs"
        self.metrics_log = MetricsLog(log_dir / f"{self.run_name}.jsonl", self.step) if self.world.main else None
        self.tracker = Tracker(args.use_wandb and self.world.main, args.wandb_project,
                               args.wandb_run_name or self.run_name, flags, log_dir, tracker_id)

    def fit(self) -> None:
        """Train to the last step, or until a signal asks to stop; log, validate and save on the way."""
        args, run, stream, strategy = self.args, self.run, self.stream, self.strategy
        if not self._start():
            return
        done = stopping = save_due = False
        while not done:
            # 1. Next batch: this rank's micro-batches of the global batch.
            run.threads.begin()
            batch = stream.next_batch(self.step)
            lr = learning_rate(self.step, stream.steps, args.learning_rate, self.warmup_steps, args.lr_schedule)
            set_learning_rate(strategy.optimizers, lr)
            for number, micro_batch in enumerate(batch.micro_batches, start=1):
                with nullcontext() if number == batch.grad_accum_steps else strategy.no_sync():
                    # 2. Forward.
                    with run.autocast():
                        loss = self.loss_fn(strategy.wrapped, to_device(micro_batch, self.device))
                    # 3. Backward. num_items counts all micro-batches and ranks; the wrapper averages over the ranks,
                    #    so a sum over all of them is multiplied by their number.
                    value = loss.loss_sum * (self.world.size / max(batch.num_items, 1))
                    if loss.aux_loss is not None:
                        value = value + loss.aux_loss / batch.grad_accum_steps
                    strategy.backward(value)
                self.interval.add_loss(loss)
            # 4. Clip the gradient of all ranks, and step.
            strategy.clip_grad_norm(args.grad_clip or math.inf)
            strategy.optimizer_step()
            self.step += 1
            self.tokens += batch.num_tokens
            self.interval.add_step(batch, lr, strategy.grad_norm, strategy.scaler.is_enabled())
            run.threads.end(batch.num_tokens)

            stopping |= self.world.any(run.stop_signal is not None)
            done = stream.can_checkpoint and (stopping or self.step >= self.last_step)
            validating = self.can_validate and (done or is_due(self.step, args.eval_interval))
            row = {}
            # 5. Log and validate.
            if done or validating or is_due(self.step, args.log_interval):
                row = self.collect_metrics() | (self.evaluate() if validating else {})
                self.log(row)
                if self._is_best(row):
                    self.save_weights(f"{args.save_weight}_best", row)
            # 6. Save, once all that was sampled has been learned from.
            save_due |= done or is_due(self.step, args.save_interval)
            if save_due and stream.can_checkpoint:
                self.save(row)
                save_due = False
            if row:
                self.interval = IntervalMetrics(self.device)
        if stopping:
            run.print_main(f"train: stopped by signal {run.stop_signal or ''} after step {self.step:,}; "
                           "continue with --from_resume 1")
        self.tracker.close()

    def _start(self) -> bool:
        """Print what is going to be trained, and validate if asked to. → whether a step is left"""
        params = list(self.strategy.unwrapped.parameters())
        total, trained = sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
        size = f"{f'{trained / 1e6:.2f} of ' if trained < total else ''}{total / 1e6:.2f} M parameters"
        self.run.print_main(f"train: {self.run_name}, {size}, steps {self.step:,} to {self.last_step:,} of "
                            f"{self.stream.steps:,}, {self.stream} on {self.world.size} x {self.device}, "
                            f"{str(self.run.dtype)[6:]}")
        if self.step >= self.last_step:
            more = "--max_steps" if self.last_step < self.stream.steps else "--epochs"
            self.run.print_main(f"train: nothing left to do; raise {more} to continue")
            return False
        self.peak_flops = peak_flops(self.device, self.run.dtype) * self.world.size
        # documents are taken to fill half a row on average
        self.flops_per_token = flops_per_token(self.strategy.unwrapped, self.stream.length / 2)
        # online RL always: the reward before training is what its result is compared with
        if not self.step and (self.validate or self.can_validate and self.args.eval_first):
            metrics = self.evaluate()
            if self.world.main:
                text = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                print(f"{self.args.save_weight} before · {text}", flush=True)
                self.metrics_log.write({"step": 0, "epoch": 0.0, "tokens": 0, **metrics})
        self.interval = IntervalMetrics(self.device)
        return True

    # -- logging and validation ----------------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        """Raise Diverged if a loss or gradient of this interval was not finite. Waits for the device."""
        if self.world.any(not bool(self.interval.is_finite)):
            raise Diverged(f"the loss or its gradient is not finite at or before step {self.step}; nothing was saved "
                           f"since ({self.resume_path.name} is intact). Lower --learning_rate, or look at the data")

    def collect_metrics(self) -> dict:
        """The metrics of the steps since the last log line."""
        self._check_finite()
        metrics = self.interval.collect(self.world)
        mfu = metrics["tokens_per_s"] * self.flops_per_token / self.peak_flops
        return {"step": self.step, "epoch": self.stream.epoch(self.step), "tokens": self.tokens, **metrics, "mfu": mfu,
                "memory_gb": peak_memory(self.device)}

    def log(self, row: dict) -> None:
        """A line on the screen, and `row` in the log file and the tracker."""
        if not self.world.main:
            return
        eta = duration((self.last_step - self.step) * self.interval.seconds_per_step)
        parts = [f"{self.args.save_weight} {row['epoch']:.2f}/{self.args.epochs:g} step "
                 f"{self.step:,}/{self.last_step:,}",
                 f"loss {row['loss']:.4f} lr {row['lr']:.2e} norm {row['grad_norm']:.2f} "
                 f"{row['tokens_per_s']:,.0f} tok/s mfu {row['mfu']:.0%} {row['memory_gb']:.1f} GB eta {eta}"]
        for names in ([*self.interval.item_sums, *self.interval.step_values],
                      [name for name in row if name.startswith("val_")]):
            parts += [" ".join(f"{name} {row[name]:.4f}" for name in names)] if names else []
        for name, reason in (("empty_steps", "no supervised token"), ("zero_grad_steps", "a gradient of exactly 0")):
            parts += [f"{reason} in {row.get(name)} of {self.interval.steps} steps"] * (name in row)
        print(" · ".join(parts), flush=True)
        self.metrics_log.write(row)
        self.tracker.log(row)

    @property
    def can_validate(self) -> bool:
        return self.val_data is not None or self.validate is not None

    def evaluate(self) -> dict:
        """{"val_…": number} of the validation rows and of `validate`."""
        rows = validate_rows(self.run, self.model, self.val_data, self.val_loss_fn) if self.val_data is not None else {}
        return rows | (self.validate() if self.validate else {})

    def _is_best(self, row: dict) -> bool:
        """Whether this row has the best validation so far: the highest val_reward, or the lowest val_loss."""
        score = -row["val_reward"] if "val_reward" in row else row.get("val_loss", math.inf)
        if is_best := score < self.best_score:  # which no score that is not a number is
            self.best_score = score
        return is_best

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def save(self, row: dict) -> None:
        """Write the weights, and the state to resume from. All ranks call it."""
        self._check_finite()
        random_states, optimizers = self.world.gather(random_state()), self.strategy.optimizer_states()
        stream = self.stream.state_dict()
        model = self.save_weights(self.args.save_weight, row)
        if self.world.main:
            save_resume(self.resume_path, {
                "settings": self.settings, "inputs": self.inputs, "steps": self.stream.steps, "step": self.step,
                "tokens": self.tokens, "best": self.best_score,
                "stream": stream, "scaler": self.strategy.scaler.state_dict(), "random": random_states,
                # what is trained; the rest is in the parent's weights
                "model": {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)
                          if p.requires_grad},
                "optimizers": optimizers, "tracker": self.tracker.run_id,
            })

    def save_weights(self, name: str, row: dict) -> nn.Module:
        """Write the weights under `name`. All ranks call it. → the model with its full weights, on the first rank"""
        model = self.strategy.gather_full_model()
        if self.world.main:
            self.save_fn(model, name, self.args.save_dir, self.run.tokenizer, **self.metadata,
                         tokens_seen=self.tokens, step=self.step, metrics=row)
        return model

    def _load_weights(self) -> dict | None:
        """Load the resume state, and its weights into the model, which is not sharded yet."""
        name, folder = self.args.save_weight, self.resume_path.parent
        is_base = weight_kind(name for name, _ in self.model.named_parameters()) == "language model"
        state = load_resume(self.resume_path, self.settings, self.inputs, name if is_base else None)
        if state is None:
            others = ", ".join(path.name for path in sorted(folder.glob(f"{glob.escape(name)}_*_resume.pth")))
            self.run.print_main(f"resume: no {self.resume_path.name} yet{f' (there: {others})' * bool(others)}, "
                                "starting from the beginning")
        else:
            trained = {name for name, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
            if missing := sorted(trained - state["model"].keys()):
                raise UserError(f"{self.resume_path} does not fit the model: it has no {missing[0]}")
            load_state(self.model, self.model.state_dict() | state["model"], self.resume_path)
        return state

    def _resume(self, state: dict) -> str | None:
        """Restore the rest of the resume state. → the tracker's run id"""
        try:
            self.strategy.load_optimizer_states(state["optimizers"])
            if state["scaler"]:  # {} where the run was not in float16
                self.strategy.scaler.load_state_dict(state["scaler"])
            self.stream.load_state_dict(state["stream"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.resume_path} does not fit this run: {first_line(error)}; --from_resume 0 starts "
                            "anew") from None
        self.step, self.tokens, self.best_score = state["step"], state["tokens"], state["best"]
        if len(state["random"]) == self.world.size:
            restore_random_state(state["random"][self.world.rank])
        self.run.print_main(f"resume: continuing after step {self.step:,}")
        if (steps := state.get("steps", self.stream.steps)) != self.stream.steps:
            change = "stretches" if steps < self.stream.steps else "cuts"
            self.run.print_main(f"resume: --epochs {self.args.epochs:g} {change} the schedule of the learning rate "
                                f"from {steps:,} to {self.stream.steps:,} steps, from here on")
        return state["tracker"]


def is_due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps (0: never) is done after `step`."""
    return interval > 0 and step % interval == 0
