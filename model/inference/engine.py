"""The inference engine: continuous batching, chunked prefill, prefix caching. Everything that samples uses it.

    add a request → step: schedule → run → sample → finish, until nothing is busy

`sequence.py` is one request, `scheduler.py` decides what runs next, `kv_cache.py` keeps keys and values in slots,
`model_runner.py` computes logits, `sampling.py` chooses tokens, of those that `constraints.py` allows. Between two
steps requests come, go and are cancelled.
A completion depends on its prompt, its params and its seed, and on its neighbours only through the rounding of the
matrix products.
"""

from collections.abc import Iterator
from dataclasses import replace
from threading import Lock

import torch
from torch import Tensor, nn

from model.chat import ChatTokenizer
from model.cli import notice
from model.inference.constraints import allowed_tokens
from model.inference.kv_cache import KVCache, SlotManager
from model.inference.model_runner import ModelRunner
from model.inference.sampling import SamplingParams, add_logit_bias, apply_penalties, sample
from model.inference.scheduler import Scheduler
from model.inference.sequence import Sequence, TokenDelta
from model.threads import ThreadTuner

__all__ = ["Engine", "SamplingParams", "Sequence", "TokenDelta", "generate"]
SLOT_LEN = 2048  # tokens of cache per sequence, by default
STEP_COST = 16  # in tokens, of a step on a CPU: with n tokens it takes as long as STEP_COST + n


class Engine:
    """Samples from `model` for many requests at once. Only `add` and `stream` may be called by several threads.

    `max_batch` sequences run together; `max_tokens` bounds the cache in tokens (default: `max_batch` slots of 2,048,
    or one as long as the model's positions up to 32,768). A step reads at most about `prefill_chunk` prompt tokens
    (default: 512, on a GPU 4,096).
    `tokenizer` is needed for text and stop strings only. The cache belongs to the weights as they are: after changing
    them, call `reset_prefix_cache`. `compile` takes half a minute at the first tokens (seconds, once it is cached on
    disk) and then saves time at each step. `graphs`: decode by CUDA graphs (default: on a GPU, wherever that is
    possible). `adapt_threads`: on a CPU, use fewer threads while other programs are busy; sums are then rounded in
    another order.
    """

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer | None = None, max_batch: int = 32,
                 max_tokens: int | None = None, prefill_chunk: int | None = None, compile: bool = False,
                 graphs: bool | None = None, adapt_threads: bool = False):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.max_positions = model.config.max_position_embeddings
        max_tokens = max_tokens or max(max_batch * min(self.max_positions, SLOT_LEN), min(self.max_positions, 32768))
        self.max_seq_len = min(self.max_positions, max_tokens)
        device = model.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        with torch.inference_mode():  # as all that writes to it; a graph takes no tensors of another mode
            cache = KVCache(model.config, model.device, dtype)
        self.slots = SlotManager(cache, max_batch, max_tokens, self.max_seq_len)
        self.scheduler = Scheduler(self.slots, prefill_chunk or (4096 if device == "cuda" else 512))
        self.runner = ModelRunner(model, self.slots, compile, graphs)
        self.threads = ThreadTuner(adapt_threads and device == "cpu")
        self._lock = Lock()

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return self.slots.num_running

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values were reused instead of computed, since the start."""
        return self.slots.num_cached_tokens

    @property
    def busy(self) -> bool:
        """Whether requests wait or run."""
        return bool(self.num_waiting or self.num_running)

    def add(self, prompt_ids: list[int], params: SamplingParams = SamplingParams()) -> Sequence:  # noqa: B008 (frozen)
        """Queue a request. Raises ValueError for a prompt that is empty, too long, or outside the vocabulary."""
        if not prompt_ids:
            raise ValueError("the prompt is empty")
        vocab_size = self.model.config.vocab_size
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise ValueError(f"the prompt has ids outside the model's vocabulary of {vocab_size:,} tokens")
        if len(prompt_ids) >= self.max_seq_len:
            owner = "the model's" if self.max_seq_len == self.max_positions else "the cache's"
            raise ValueError(f"a prompt of {len(prompt_ids):,} tokens leaves no room for an answer in {owner} "
                             f"{self.max_seq_len:,} positions")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if any(token >= vocab_size for token, _ in params.logit_bias):
            raise ValueError(f"logit_bias has ids outside the model's vocabulary of {vocab_size:,} tokens")
        sequence = Sequence(prompt_ids, params, self.tokenizer)
        self.scheduler.waiting.append(sequence)
        return sequence

    @torch.inference_mode()  # the cache is written in that mode only
    def cancel(self, sequence: Sequence) -> None:
        """End a request, at any moment between two steps. Its slot is free at once; a finished one stays as it is."""
        if sequence.finish_reason is None:
            sequence.finish("cancelled")
            self.scheduler.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One more token for every decoding sequence, and a chunk of the prompts. → the sequences that got a token

        When it raises, the state of the running sequences is unknown: they are cancelled.
        """
        batches = self.scheduler.schedule()
        if not batches:
            return []
        self.threads.begin()
        try:
            logits = self.runner.run(batches)
            sequences = [batch.sequences[row] for batch in batches for row in batch.sampled_rows]
            if sequences:  # else there were only chunks of longer prompts
                tokens = self._sample(logits, sequences)
                self._finish(sequences, *tokens)
        except Exception:
            for sequence in self.slots.running:
                self.cancel(sequence)
            for sequence in self.slots.running:  # those that had just finished
                self.slots.free(sequence)
            raise
        self.threads.end(STEP_COST + sum(len(chunk) for batch in batches for chunk in batch.chunks))
        return sequences

    def _sample(self, logits: Tensor, sequences: list[Sequence]) -> tuple[list[int], list[float], list]:
        """The next token of each sequence from its row of logits [n, V], its logprob and its top_logprobs."""
        params = [s.params for s in sequences]
        logits = add_logit_bias(logits, params)
        if any(p.has_penalties for p in params):
            logits = logits.float()
        for row, s in enumerate(sequences):
            if s.params.has_penalties:
                if s.token_counts is None:
                    counts = [torch.tensor(ids, dtype=torch.long).bincount(minlength=logits.shape[1])
                              for ids in (s.prompt_ids, s.completion_ids)]
                    s.token_counts = torch.stack(counts).to(logits.device)
                logits[row] = apply_penalties(logits[row], s.params, *s.token_counts)
        allowed = allowed_tokens([s.grammar for s in sequences], logits.shape[1], logits.is_cuda)
        return sample(logits, params, [s.rng.random() for s in sequences], allowed)

    def _finish(self, sequences: list[Sequence], tokens: list[int], logprobs: list[float], top_logprobs: list) -> None:
        """Append the sampled tokens; free the slots of sequences that end with them."""
        for sequence, *token in zip(sequences, tokens, logprobs, top_logprobs, strict=True):
            sequence.append_token(*token)
            if sequence.finish_reason is None and len(sequence.token_ids) > self.max_seq_len:
                sequence.finish("length")
        for sequence in reversed(sequences):  # the last slot first: those that finish together swap few slots
            if sequence.finish_reason is not None:
                self.slots.free(sequence)

    def reset_prefix_cache(self) -> None:
        """Drop what was computed, as one must after changing the weights. Raises RuntimeError while busy."""
        if self.busy:
            raise RuntimeError("the prefix cache cannot be reset while requests are running")
        self.slots.reset()
        self.runner.prepack()

    def warm_up(self) -> None:
        """Before the first request, compile what decoding needs, if it is to be compiled: one row, and several."""
        if not self.runner.compile:
            return
        notice("compiling: half a minute the first time, seconds later on")
        threads, self.threads = self.threads, ThreadTuner(enabled=False)  # compiling says nothing about their number
        for num_rows in sorted({1, min(2, self.max_batch)}):
            prompts = [[row] * min(37, self.max_seq_len - 3) for row in range(num_rows)]
            self.generate(prompts, [SamplingParams(3, temperature=0.0, stop_ids=())] * num_rows)
        self.reset_prefix_cache()
        self.threads = threads

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Sequence]:
        """Answer all prompts. → their finished sequences, in the same order"""
        sequences = [self.add(*request) for request in zip(prompts, params, strict=True)]
        while self.busy:
            self.step()
        return sequences

    def stream(self, sequence: Sequence) -> Iterator[TokenDelta]:
        """What each step adds to a sequence that was added, until it finishes. Closing the iterator cancels it.

        Threads that stream at the same time take turns: whoever gets the lock takes a step for all of them.
        """
        finish_reason = None
        try:
            while finish_reason is None:
                if self._lock.acquire(timeout=0.02):  # else the step of another thread extends this sequence too
                    try:
                        if sequence.finish_reason is None:
                            self.step()
                    finally:
                        self._lock.release()
                delta = sequence.next_delta()
                finish_reason = delta.finish_reason
                if delta.num_tokens or finish_reason:
                    yield delta
        except GeneratorExit:
            with self._lock:
                self.cancel(sequence)
            raise


def generate(model: nn.Module, prompts: list[list[int]], params: SamplingParams | list[SamplingParams],
             tokenizer: ChatTokenizer | None = None, **options) -> list[Sequence]:
    """Answer all prompts; `options` go to the Engine. With one SamplingParams, prompt i is sampled with seed + i."""
    if isinstance(params, SamplingParams):
        params = [replace(params, seed=params.seed + i) for i in range(len(prompts))]
    return Engine(model, tokenizer, **options).generate(prompts, params)
