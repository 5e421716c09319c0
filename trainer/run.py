"""What a run of any stage starts from: device, ranks, precision, seed, tokenizer, data and models, and signals."""

import math
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from dataset.prompts import PromptDataset
from dataset.token_cache import TokenDataset
from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import Failure, UserError, first_line
from model.device import compile_error, keep_freed_memory, machine_memory, training_dtype
from model.loading import MODEL_SIZES, check_sizes
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindPreTrainedModel
from model.threads import ThreadTuner
from model.weights import find_weight, read_weight, tokenizer_of
from trainer.batches import MIN_STEPS, adapt_batch, global_batch_size
from trainer.checkpoint import read_resume, resume_name
from trainer.distributed import init_distributed

LENGTHS = ("max_seq_len", "max_gen_len", "max_total_len")


class Run:
    """The context of one training run: `with Run(args) as run`.

    Inside: `world` (this rank among all), `device`, `dtype` of the matrix products and `tokenizer`.
    """

    def __init__(self, args):
        self.args = args
        self.stop_signal: int | None = None  # SIGINT or SIGTERM, once it has arrived
        self.strategy = None  # of the model that is trained, set by its Trainer
        self.sources: list[Path] = []  # the weights it reads, which must not be written over

    def __enter__(self) -> "Run":
        args = self.args
        with ExitStack() as stack:
            self.world, self.device = stack.enter_context(init_distributed(args.device))
            stack.enter_context(self._handle_signals())
            self.dtype = self._choose_dtype()
            if args.use_compile is None:  # eager, a small model waits for the host to start its many kernels
                args.use_compile = int(self.device.type == "cuda")
            random.seed(args.seed)
            torch.manual_seed(args.seed)
            torch.set_float32_matmul_precision("high")  # TF32 where there is one
            on_cpu = self.device.type == "cpu"
            if on_cpu:
                keep_freed_memory()
            self.threads = ThreadTuner(bool(args.adapt_threads) and on_cpu and self.world.size == 1)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            folder = args.tokenizer
            if args.from_weight != "none":
                self.sources.append(find_weight(args.from_weight, args.save_dir, args.hidden_size, args.use_moe))
                folder = tokenizer_of(self.sources[0], folder)
            self.tokenizer = ChatTokenizer(folder or TOKENIZER_DIR)
            if getattr(args, "num_workers", 0):
                os.environ["RAYON_NUM_THREADS"] = str(args.num_workers)
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stack.__exit__(kind, error, trace)
        if isinstance(error, torch.OutOfMemoryError):
            raise Failure(f"{self.device} is out of memory: lower --batch_size and raise --accumulation_steps, which "
                          f"takes the same steps ({first_line(error)})") from error

    def print_main(self, text: str) -> None:
        """Print on the first rank only."""
        if self.world.main:
            print(text, flush=True)

    # -- data ----------------------------------------------------------------------------------------------------------

    def load_datasets(self, dataset_class: type[TokenDataset], **options) -> list[TokenDataset | None]:
        """The rows to train and to validate on, tokenised once for all ranks of a machine; None without a path."""
        args = self.args
        data, val_data = (self._load_dataset(dataset_class, path, **options) if path else None
                          for path in (args.data_path, args.val_data_path))
        default = global_batch_size(args, self.world)
        if args.adapt_batch and not args.global_batch_size:
            args.batch_size, args.accumulation_steps = adapt_batch(
                len(data), args.batch_size, args.accumulation_steps, self.world.size)
        rows = global_batch_size(args, self.world)
        if rows < default:
            self.print_main(f"data: {len(data):,} rows are few, so that a step takes {rows:,} of them instead of "
                            f"{default:,} (--batch_size decides otherwise)")
        if (steps := math.ceil(args.epochs * len(data) / rows)) < MIN_STEPS:
            self.print_main(f"data: {data.meta['documents']:,} documents fill {len(data):,} rows, so that there are "
                            f"only {steps:,} steps; {'lower --batch_size or ' * (rows > 1)}raise --epochs")
        return [data, val_data]

    def _load_dataset(self, dataset_class: type[TokenDataset], path: Path, **options) -> TokenDataset:
        args = self.args
        with self.world.main_first():
            start = time.perf_counter()
            data = dataset_class(path, self.tokenizer, args.max_seq_len, bool(args.packing), bool(args.skip_bad_rows),
                                 args.cache_dir, **options)
        self.print_main(f"data: {path.name}: {data.meta['documents']:,} documents, {data.meta['tokens']:,} tokens in "
                        f"{len(data):,} rows of {data.row_length}, {data.utilization:.1%} full "
                        f"({time.perf_counter() - start:.1f} s)")
        for warning in data.warnings:
            self.print_main(f"data: {warning}")
        return data

    def load_prompts(self) -> list[PromptDataset | None]:
        """The prompts to train and to validate on, for online RL; None without a path."""
        return [self._load_prompts(path) if path else None for path in (self.args.data_path, self.args.val_data_path)]

    def _load_prompts(self, path: Path) -> PromptDataset:
        args = self.args
        prompts = PromptDataset(path, self.tokenizer, args.max_seq_len, bool(args.skip_bad_rows), args.thinking_ratio,
                                args.seed)
        self.print_main(f"data: {path.name}: {len(prompts):,} prompts")
        for warning in prompts.warnings:
            self.print_main(f"data: {warning}")
        rollouts = math.ceil(args.epochs * len(prompts) / (per_rollout := global_batch_size(args, self.world)))
        if path == args.data_path and rollouts < MIN_STEPS:
            self.print_main(f"data: {len(prompts):,} prompts are enough for {rollouts:,} rollouts only; "
                            f"{'lower --batch_size or ' * (per_rollout > 1)}raise --epochs")
        return prompts

    # -- models --------------------------------------------------------------------------------------------------------

    def load_model(self) -> MiniMindForCausalLM:
        """The weights `--from_weight`, or a new model of the sizes in the flags, the same on every rank."""
        model, args = self._load_model(), self.args
        length = getattr(args, "max_total_len", args.max_seq_len + getattr(args, "max_gen_len", 0))
        if length > (most := model.config.max_position_embeddings):
            raise UserError(f"the model has {most:,} positions, and these flags ask for {length:,}: lower "
                            f"{' and '.join(f'--{name}' for name in LENGTHS if hasattr(args, name))}")
        if self.args.from_resume and not self.args.global_batch_size:
            self._keep_global_batch_size(self.args.checkpoint_dir / resume_name(self.args.save_weight, model.config))
        return model

    def _keep_global_batch_size(self, path: Path) -> None:
        """Continue with as many rows per step as before, when the number of ranks has changed."""
        state = read_resume(path, mmap=True)
        if state is None or len(state["random"]) == self.world.size:
            return
        rows = state["settings"].get("global_batch_size", 0)
        if rows % self.world.size:
            raise UserError(f"{path} was made with {rows} rows per step, which {self.world.size} ranks cannot share "
                            "evenly; start as many ranks as divide them")
        self.print_main(f"resume: {rows} rows per step, as before on {len(state['random'])} ranks")
        self.args.global_batch_size = rows

    def _load_model(self) -> MiniMindForCausalLM:
        args = self.args
        if args.from_weight == "none":
            sizes = {name: value for name in MODEL_SIZES if (value := getattr(args, name)) is not None}
            try:
                config = MiniMindConfig(vocab_size=self.tokenizer.vocab_size, **sizes)
            except ValueError as error:
                raise UserError(str(error)) from None
            with torch.device("meta"):
                num_bytes = 4 * sum(p.numel() for p in MiniMindForCausalLM(config).parameters())
            if num_bytes > (memory := machine_memory() or math.inf):
                raise UserError(f"a model of these sizes takes {num_bytes / 1e9:,.0f} GB in fp32, and this machine has "
                                f"{memory / 1e9:,.0f} GB of memory; lower --hidden_size or --num_hidden_layers")
            return MiniMindForCausalLM(config)
        model, _ = read_weight(self.sources[0], self.tokenizer)
        check_sizes(args, model.config, f"weight {args.from_weight}")
        return model

    def prepare(self, model: nn.Module) -> nn.Module:
        """`model` on the device, its blocks compiled with --use_compile."""
        self.compile(model)
        return model.to(self.device)

    def freeze(self, model: nn.Module) -> nn.Module:
        """`model` on the device, in evaluation mode, without gradients."""
        return self.prepare(model).eval().requires_grad_(False)

    def compile(self, model: nn.Module) -> None:
        """With --use_compile, compile each block of our decoder in place, once; stay eager where no compiler works."""
        is_ours = isinstance(model, MiniMindPreTrainedModel)
        if not self.args.use_compile or not is_ours or model.model.layers[0]._compiled_call_impl is not None:
            return
        if error := compile_error(self.device):
            self.print_main(f"compile: not possible here, continuing without it ({error})")
            self.args.use_compile = 0
            return
        from torch._inductor import config

        config.cpp.dynamic_threads = self.threads.enabled  # else another number of threads compiles anew
        for layer in model.model.layers:  # of one shape: compiled once for all
            layer.compile(dynamic=False)

    def autocast(self):
        """The context of a forward pass: half precision where the machine has units for it."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def summon_full_params(self):
        """A context in which each rank may call the trained model as often as it likes. All ranks enter it."""
        return self.strategy.summon_full_params() if self.strategy else nullcontext()

    # -- setup ---------------------------------------------------------------------------------------------------------

    def _choose_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.args.dtype)
        if self.device.type == "cpu" and dtype == torch.float16:
            raise UserError("--dtype float16 needs a GPU; use bfloat16 or float32 on a CPU")
        if dtype != torch.bfloat16:
            return dtype
        dtype = training_dtype(self.device)
        return torch.float32 if dtype == torch.float16 and self.args.parallel != "ddp" else dtype  # shards do not scale

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT stops at once."""
        def request_stop(number, _frame):
            if self.stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number

        previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Exception:
            if self.world.size > 1:  # the launcher terminates the other ranks: let each print its own error first
                previous[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
