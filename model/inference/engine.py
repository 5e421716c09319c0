"""THE inference engine: continuous batching, chunked prefill, prefix reuse. All that samples uses it.

A step of the engine is at most two of the model: the next token of every sequence that answers, and a chunk of the
prompts that are still being read, so a long prompt never stalls the others (Orca, Yu et al. 2022; Sarathi, Agrawal et
al. 2023). Between two steps requests come, go and are cancelled. A sequence that ended leaves its keys and values
behind until their place is needed: a later prompt that begins alike starts from a copy. While all that answer begin
alike, attention reads that beginning once a step. A request's answer depends on its prompt, its sampling and its seed,
and on its neighbours only through the rounding of the matrix products.
"""

import codecs
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.chat import SPECIAL_TOKENS, ChatTokenizer
from model.inference.cuda_graphs import DecodeGraphs, can_capture
from model.inference.kv_cache import KVCache
from model.inference.prepacked import prepack, use_prepacked
from model.inference.sampling import SamplingParams, apply_penalties, sample
from model.linear import bucket_size

__all__ = ["Engine", "SamplingParams", "Sequence", "generate", "stream"]
SLOT_LEN, MIN_SLOT_LEN = 2048, 256  # tokens a place gets by default, and what the cache starts with
MIN_PREFIX_REUSE = 8  # a shorter common beginning is read anew
MIN_PREFIX_SHARE = 1024  # keys that a step must save by it, or each sequence reads all of its own
ID_TO_TOKEN = {number: marker for marker, number in SPECIAL_TOKENS.items()}


class Sequence:
    """One request: its prompt and what has been sampled so far. `Engine.add` makes it, `Engine.step` fills it.

    `completion_ids` end with the stop token if there was one; `logprobs` (nats) belong to them, each under the
    distribution its token was sampled from. `finish_reason` is None while it runs, then "stop", "length" or
    "cancelled". `output_pieces` grows by what may be shown: text, never half a character or part of a stop string, and
    the ids of special tokens (`<think>`, …).
    """

    def __init__(self, prompt_ids: list[int], params: SamplingParams, tokenizer: ChatTokenizer | None):
        self.prompt_ids, self.params = list(prompt_ids), params
        self.completion_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.output_pieces: list[str | int] = []
        self.finish_reason: str | None = None
        self.num_cached_tokens = 0  # tokens of the prompt that were not computed again
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending_text = ""  # may become a stop string
        self._rng = random.Random(params.seed)
        self._token_ids = list(prompt_ids)  # prompt and answer
        self._num_computed = 0  # how many of them are in the cache
        self._token_counts: Tensor | None = None  # [2, V]: how often each token stands in the prompt, in the answer
        self._freed_at = 0  # when it gave its place free

    @property
    def text(self) -> str:
        """The answer's text that is safe to show, special tokens left out."""
        return "".join(piece for piece in self.output_pieces if isinstance(piece, str))

    @property
    def answer_ids(self) -> list[int]:
        """The sampled ids without the stop token."""
        ids = self.completion_ids
        return ids[:-1] if ids and ids[-1] in self.params.stop_ids else list(ids)

    def _append_token(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Append a sampled token; say what became safe to show; end if it asks for that."""
        self.completion_ids.append(token)
        self._token_ids.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        if self._token_counts is not None:
            self._token_counts[1, token] += 1
        if token in self.params.stop_ids:
            self._finish("stop")
            return
        if self._tokenizer is not None:
            if 35 < token < self._tokenizer.vocab_size:
                self._emit_text(self._utf8.decode(self._tokenizer.token_bytes[token]))
            elif token in ID_TO_TOKEN:
                self._utf8.reset()
                self._emit_text("", last=True)
                if ID_TO_TOKEN[token] in self.params.stop:
                    self.finish_reason = "stop"
                else:
                    self.output_pieces.append(token)
        if self.finish_reason is None and len(self.completion_ids) >= self.params.max_new_tokens:
            self._finish("length")

    def _emit_text(self, text: str, last: bool = False) -> None:
        """Hold `text` back as far as it may become a stop string, say the rest, end before a stop string."""
        held, stops = self._pending_text + text, self.params.stop
        found = min((at for stop in stops if (at := held.find(stop)) >= 0), default=None)
        if found is not None:
            self.finish_reason, ready, self._pending_text = "stop", held[:found], ""
        else:
            tail = 0 if last else max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])),
                                      default=0)
            ready, self._pending_text = held[:len(held) - tail], held[len(held) - tail:]
        if ready:
            self.output_pieces.append(ready)

    def _finish(self, reason: str) -> None:
        """Nothing follows: what was held back is text after all. Half a character is not."""
        self._emit_text("", last=True)
        self.finish_reason = reason


class Engine:
    """Samples from `model` for many requests at once. Not thread-safe: one thread owns it.

    `max_batch` sequences run together; `max_tokens` bounds the cache in tokens (default: `max_batch` places of 2,048,
    or one as long as the model's positions up to 32,768). A step reads at most about `prefill_chunk` prompt tokens.
    `tokenizer` is needed for text and stop strings only. What is kept for reuse belongs to the weights as they are:
    after changing them, call `reset_prefix_cache`. `compile` takes a minute or two at the first tokens and then saves
    time at each step.
    `graphs`: decode by CUDA graphs (default: on a GPU, wherever that is possible).
    """

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer | None = None, max_batch: int = 32,
                 max_tokens: int | None = None, prefill_chunk: int = 512, compile: bool = False,
                 graphs: bool | None = None):
        self.model, self.tokenizer, self.max_batch, self.prefill_chunk = model, tokenizer, max_batch, prefill_chunk
        self.positions = model.config.max_position_embeddings
        self.max_tokens = max_tokens or max(max_batch * min(self.positions, SLOT_LEN), min(self.positions, 32768))
        self.max_seq_len = min(self.positions, self.max_tokens)  # tokens of a sequence
        self.num_cached_tokens = 0  # of prompts, since the start
        self._waiting: list[Sequence] = []
        self._places: list[Sequence | None] = []  # the first `running` run, the others are kept for reuse, or None
        self._num_running = 0
        self._clock = 0
        self._compiled = torch.compile(model.model, dynamic=True) if compile else None
        # for training, one shape: any other would be compiled too, and training itself soon not any more
        self._blocks_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        device = model.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        with torch.inference_mode():  # as all that fills it; a graph takes no tensors of another mode
            self._cache = KVCache(model.config, 0, 0, model.device, dtype)  # the first request says how long a place is
        self._graphs = DecodeGraphs() if (can_capture(model, dtype) if graphs is None else graphs) else None
        self.reset_prefix_cache()

    @property
    def num_waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return self._num_running

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self._waiting or self._num_running)

    def add(self, prompt: list[int], params: SamplingParams = SamplingParams()) -> Sequence:  # noqa: B008 (frozen)
        """Queue a request. Raises ValueError when the prompt is empty, no tokens, or leaves no room for an answer."""
        if not prompt:
            raise ValueError("the prompt is empty")
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            raise ValueError(f"the prompt holds numbers that are none of the model's {self.model.config.vocab_size:,} "
                             "tokens")
        if len(prompt) >= self.max_seq_len:
            of_what = "the model's" if self.max_seq_len == self.positions else "the cache's"
            raise ValueError(f"a prompt of {len(prompt):,} tokens leaves no room for an answer in {of_what} "
                             f"{self.max_seq_len:,} positions")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        sequence = Sequence(prompt, params, self.tokenizer)
        self._waiting.append(sequence)
        return sequence

    @torch.inference_mode()  # the cache is written in that mode only
    def cancel(self, sequence: Sequence) -> None:
        """End a request, at any moment between two steps. Its place is free at once; a finished one stays as it is."""
        if sequence.finish_reason is not None:
            return
        sequence._finish("cancelled")
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)

    def reset_prefix_cache(self) -> None:
        """Drop what was computed for reuse, as one must after changing the weights. Raises RuntimeError while busy."""
        if self.busy:
            raise RuntimeError("requests are being answered: what they have computed cannot be forgotten")
        self._places = [None] * len(self._places)
        # a compiler has orders of its own
        self._prepacked = prepack(self.model, self._cache.keys[0].dtype) if self._compiled is None else []

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One more token for all that answer, a chunk for those that read. → those that got a token or ended."""
        self._clock += 1
        self._admit()
        ready, logits = [], []
        with use_prepacked(self._prepacked):
            for places in (self._answering(), self._reading()):
                if places:
                    done, of_done = self._forward(places)
                    ready += done
                    logits.append(of_done)
        if not ready:
            return []
        for sequence, *result in zip(ready, *self._draw(torch.cat(logits), ready), strict=True):
            sequence._append_token(*result)
            if sequence.finish_reason is None and len(sequence._token_ids) > self.max_seq_len:
                sequence._finish("length")
        for sequence in reversed(ready):  # the last place first: those that leave together swap few places
            if sequence.finish_reason is not None:
                self._leave(sequence)
        return ready

    # -- the model -----------------------------------------------------------------------------------------------------

    def _answering(self) -> list[int]:
        """The places of which one token is to be read: the first ones, so that the cache is one slice."""
        count = 0
        for place in range(self._num_running):
            sequence = self._places[place]
            if len(sequence._token_ids) - sequence._num_computed == 1:
                if place != count:
                    self._swap(place, count)
                count += 1
        self._reserve(max((len(s._token_ids) for s in self._places[:count]), default=0))
        return list(range(min(count, self._num_running)))

    def _reading(self) -> list[int]:
        """The next places that still read their prompts, as many as fit a chunk when padded to the longest."""
        chosen: list[int] = []
        longest = 0
        for place, sequence in enumerate(self._places[:self._num_running]):
            left = len(sequence._token_ids) - sequence._num_computed
            if left > 1:
                longest = max(longest, min(left, self.prefill_chunk))
                if chosen and (len(chosen) + 1) * longest > self.prefill_chunk:
                    break
                chosen.append(place)
        return chosen

    def _forward(self, places: list[int]) -> tuple[list[Sequence], Tensor]:
        """Read the next tokens of each place, at most a chunk. → those that have read all, and their logits [n, V]."""
        device, sequences = self.model.device, [self._places[place] for place in places]
        chunks = [s._token_ids[s._num_computed:][:self.prefill_chunk] for s in sequences]
        width = max(map(len, chunks))
        # padding repeats a row's last token at its own position: it writes what is there already
        positions = [[min(s._num_computed + column, s._num_computed + len(chunk) - 1) for column in range(width)]
                     for s, chunk in zip(sequences, chunks, strict=True)]
        seen = max(row[-1] for row in positions) + 1
        ids = [chunk + [chunk[-1]] * (width - len(chunk)) for chunk in chunks]
        answering = width == 1 and places == list(range(len(places)))
        few = self._compiled is not None or self._graphs is not None
        if answering and few:  # rows of nobody, in the next places: a graph for few sizes only
            spare = min(bucket_size(len(places)), self._cache.places) - len(places)
            places = [*places, *range(len(places), len(places) + spare)]
            ids, positions = ids + [[0]] * spare, positions + [[self._cache.length]] * spare
        ids, positions = torch.tensor([ids, positions], device=device)
        shared_prefix_len = self._common_prefix_len(sequences) if answering and not few else 0

        def read(ids: Tensor, positions: Tensor, seen: int) -> Tensor:
            mask = self._cache.point(places, positions, seen, shared_prefix_len)
            model = self._compiled if answering and self._compiled is not None else self.model.model
            eager = self._blocks_compiled and model is self.model.model
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache)[0]

        if answering and self._graphs is not None:
            hidden = self._graphs.run(read, ids, positions, self._length_for(seen))
        else:
            hidden = read(ids, positions, seen)
        done = []
        for row, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
            sequence._num_computed += len(chunk)
            if sequence._num_computed == len(sequence._token_ids):
                done.append((row, len(chunk) - 1, sequence))
        rows, ends = [row for row, _, _ in done], [end for _, end, _ in done]
        last = hidden[:len(done), 0] if answering and len(done) == len(chunks) else hidden[rows, ends]
        return [sequence for _, _, sequence in done], self.model.lm_head(last)

    def _common_prefix_len(self, sequences: list[Sequence]) -> int:
        """How many tokens all that answer begin with, for attention to read once; 0 where that would not pay.

        In half precision neither: products would round the scores, which PyTorch's own kernel keeps in fp32.
        """
        tokens = [s._token_ids for s in sequences]
        common = common_length(min(tokens), max(tokens))  # in their order all others lie between these two
        worth = common * (len(tokens) - 1) >= MIN_PREFIX_SHARE and self._cache.keys[0].dtype == torch.float32
        return common if worth else 0

    def _draw(self, logits: Tensor, sequences: list[Sequence]) -> tuple[list[int], list[float], list]:
        """One token for each of the rows of `logits`, with log-probability and likeliest tokens."""
        if any(s.params.has_penalties for s in sequences):
            logits = logits.float()
        for row, sequence in enumerate(sequences):
            if sequence.params.has_penalties:
                if sequence._token_counts is None:
                    halves = (torch.tensor(ids, dtype=torch.long)
                              for ids in (sequence.prompt_ids, sequence.completion_ids))
                    sequence._token_counts = torch.stack([half.bincount(minlength=logits.shape[1]) for half in halves])
                    sequence._token_counts = sequence._token_counts.to(logits.device)
                logits[row] = apply_penalties(logits[row], sequence.params, *sequence._token_counts)
        return sample(logits, [s.params for s in sequences], [s._rng.random() for s in sequences])

    # -- places --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give places to those that wait, in turn, from copies of what was computed for others where that helps."""
        for sequence in list(self._waiting):
            needed = len(sequence._token_ids) + 1
            if needed > self._cache.length or self._num_running == len(self._places):
                longest = max([needed, *(len(s._token_ids) + 1 for s in self._places[:self._num_running])])
                if self._places_at(self._length_for(longest)) <= self._num_running:
                    return  # its turn comes when others have left
                self._resize(self._length_for(longest))
            source, common = self._alike(sequence)
            if source is None:
                continue  # somebody is reading the same text: wait for a copy
            self._waiting.remove(sequence)
            self._enter(sequence, source, common)

    def _alike(self, sequence: Sequence) -> tuple[int | None, int]:
        """The place that holds the longest beginning of the sequence and its length; None if one soon will."""
        best, source, promised = 0, 0, 0
        limit = len(sequence._token_ids) - 1  # the last token is always read: its logits are wanted
        for place, other in enumerate(self._places):
            if other is not None:
                common = min(common_length(sequence._token_ids, other._token_ids), limit)
                if common < MIN_PREFIX_REUSE:
                    continue
                there = min(common, other._num_computed)
                if there > best:
                    best, source = there, place
                promised = max(promised, min(common, len(other.prompt_ids)) if place < self._num_running else 0)
        return (None if promised > best else source), best

    def _enter(self, sequence: Sequence, source: int, common: int) -> None:
        """Place a sequence after the running ones, on `common` tokens that were computed for the one at `source`."""
        target, places = self._num_running, self._places
        victim = min(range(target, len(places)),
                     key=lambda place: (places[place]._freed_at if places[place] else -1, place))
        if source >= target and common and (common == places[source]._num_computed or len(places) == target + 1):
            victim = source  # nobody else needs it: go on in its place
        if victim != target:
            self._swap(victim, target)
            source = target if source == victim else victim if source == target else source
        if common and source != target:
            self._cache.copy(source, target, common)
        places[target] = sequence
        sequence._num_computed = common
        sequence.num_cached_tokens = max(sequence.num_cached_tokens, min(common, len(sequence.prompt_ids)))
        self.num_cached_tokens += common
        self._num_running += 1

    def _leave(self, sequence: Sequence) -> None:
        """Free a place: the last running sequence moves there, what was computed stays behind it."""
        sequence._freed_at = self._clock
        sequence._token_counts = None
        self._num_running -= 1
        self._swap(self._places.index(sequence), self._num_running)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            pair = self._places[one], self._places[other]
            tokens, of_other = (s._token_ids[:s._num_computed] if s else [] for s in pair)
            self._cache.swap(one, other, common_length(tokens, of_other), max(len(tokens), len(of_other)))
            self._places[other], self._places[one] = pair

    def _reserve(self, length: int) -> None:
        """Make places long enough; if fewer of them then fit the memory, the latest sequences wait again."""
        if length > self._cache.length:
            length = self._length_for(length)
            while self._num_running > self._places_at(length):
                self._num_running -= 1
                latest, self._places[self._num_running] = self._places[self._num_running], None
                latest._num_computed = 0
                self._waiting.insert(0, latest)
            self._resize(length)

    def _resize(self, length: int) -> None:
        places = self._places_at(length)
        if (places, length) != (self._cache.places, self._cache.length):
            self._cache.resize(places, length)
            if self._graphs is not None:
                self._graphs.reset()
            self._places = (self._places + [None] * places)[:places]
            for place, sequence in enumerate(self._places):
                if sequence is not None and sequence._num_computed > length:
                    self._places[place] = None

    def _length_for(self, tokens: int) -> int:
        """The length of places that hold so many tokens: it doubles, so that growing costs little in all."""
        length = min(MIN_SLOT_LEN, self.max_seq_len)
        while length < tokens:
            length *= 2
        return min(length, self.max_seq_len)

    def _places_at(self, length: int) -> int:
        return min(self.max_batch, self.max_tokens // length)


def common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def generate(model: nn.Module, prompts: list[list[int]], params: SamplingParams | list[SamplingParams],
             tokenizer: ChatTokenizer | None = None, **options) -> list[Sequence]:
    """Answer all prompts; `options` go to the Engine. With one SamplingParams, prompt i draws with seed + i."""
    if isinstance(params, SamplingParams):
        params = [replace(params, seed=params.seed + i) for i in range(len(prompts))]
    engine = Engine(model, tokenizer, **options)
    sequences = [engine.add(*request) for request in zip(prompts, params, strict=True)]
    while engine.busy:
        engine.step()
    return sequences


def stream(model: nn.Module, prompt: list[int], params: SamplingParams, tokenizer: ChatTokenizer | None = None,
           **options) -> Iterator[Sequence]:
    """Answer one prompt: the same sequence after each of its tokens, the last time with its finish_reason."""
    engine = Engine(model, tokenizer, max_batch=1, **options)
    engine.add(prompt, params)
    while engine.busy:
        yield from engine.step()
