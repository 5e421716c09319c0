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
from model.inference.cuda_graphs import DecodeGraphs, capturable
from model.inference.kv_cache import KVCache
from model.inference.prepacked import prepack, use_prepacked
from model.inference.sampling import Sampling, draw, penalise
from model.linear import bucket_size

__all__ = ["Engine", "Sampling", "Sequence", "generate", "stream"]
PLACE_LENGTH, SMALLEST_LENGTH = 2048, 256  # tokens a place gets by default, and what the cache starts with
WORTH_COPYING = 8  # a shorter common beginning is read anew
WORTH_SHARING = 1024  # keys that a step must save by it, or each sequence reads all of its own
ID_TO_TOKEN = {number: marker for marker, number in SPECIAL_TOKENS.items()}


class Sequence:
    """One request: its prompt and what has been sampled so far. `Engine.add` makes it, `Engine.step` fills it.

    `ids` end with the stop token if there was one; `logprobs` (nats) go with them, each under the distribution its
    token was drawn from. `finish_reason` is None while it runs, then "stop", "length" or "cancelled". `said` grows by
    what may be shown: text, never half a character nor part of a stop string, and the ids of markers (`<think>`, …).
    """

    def __init__(self, prompt: list[int], sampling: Sampling, tokenizer: ChatTokenizer | None):
        self.prompt, self.sampling = list(prompt), sampling
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]]] = []
        self.said: list[str | int] = []
        self.finish_reason: str | None = None
        self.reused = 0  # tokens of the prompt that were not computed again
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # may become a stop string
        self._dice = random.Random(sampling.seed)
        self._tokens = list(prompt)  # prompt and answer
        self._computed = 0  # how many of them are in the cache
        self._counts: Tensor | None = None  # [2, V]: how often each token stands in the prompt, in the answer
        self._left_at = 0  # when it gave its place free

    @property
    def text(self) -> str:
        """The answer's text that is safe to show, special tokens left out."""
        return "".join(piece for piece in self.said if isinstance(piece, str))

    @property
    def answer_ids(self) -> list[int]:
        """The sampled ids without the stop token."""
        return self.ids[:-1] if self.ids and self.ids[-1] in self.sampling.stop_ids else list(self.ids)

    def _take(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Append a sampled token; say what became safe to show; end if it asks for that."""
        self.ids.append(token)
        self._tokens.append(token)
        self.logprobs.append(logprob)
        self.top.append(top)
        if self._counts is not None:
            self._counts[1, token] += 1
        if token in self.sampling.stop_ids:
            self._end("stop")
            return
        if self._tokenizer is not None:
            if 35 < token < self._tokenizer.vocab_size:
                self._say(self._utf8.decode(self._tokenizer.token_bytes[token]))
            elif token in ID_TO_TOKEN:
                self._utf8.reset()
                self._say("", last=True)
                if ID_TO_TOKEN[token] in self.sampling.stop:
                    self.finish_reason = "stop"
                else:
                    self.said.append(token)
        if self.finish_reason is None and len(self.ids) >= self.sampling.max_new_tokens:
            self._end("length")

    def _say(self, text: str, last: bool = False) -> None:
        """Hold `text` back as far as it may become a stop string, say the rest, end before a stop string."""
        held, stops = self._held + text, self.sampling.stop
        found = min((at for stop in stops if (at := held.find(stop)) >= 0), default=None)
        if found is not None:
            self.finish_reason, ready, self._held = "stop", held[:found], ""
        else:
            tail = 0 if last else max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])),
                                      default=0)
            ready, self._held = held[:len(held) - tail], held[len(held) - tail:]
        if ready:
            self.said.append(ready)

    def _end(self, reason: str) -> None:
        """Nothing follows: what was held back is text after all. Half a character is not."""
        self._say("", last=True)
        self.finish_reason = reason


class Engine:
    """Samples from `model` for many requests at once. Not thread-safe: one thread owns it.

    `max_batch` sequences run together; `max_tokens` bounds the cache in tokens (default: `max_batch` places of 2,048,
    or one as long as the model's positions up to 32,768). A step reads at most about `prefill_chunk` prompt tokens.
    `tokenizer` is needed for text and stop strings only. What is kept for reuse belongs to the weights as they are:
    after changing them, `forget`. `compile` takes a minute or two at the first tokens and then saves time at each step.
    `graphs`: decode by CUDA graphs (default: on a GPU, wherever that is possible).
    """

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer | None = None, max_batch: int = 32,
                 max_tokens: int | None = None, prefill_chunk: int = 512, compile: bool = False,
                 graphs: bool | None = None):
        self.model, self.tokenizer, self.max_batch, self.prefill_chunk = model, tokenizer, max_batch, prefill_chunk
        self.positions = model.config.max_position_embeddings
        self.max_tokens = max_tokens or max(max_batch * min(self.positions, PLACE_LENGTH), min(self.positions, 32768))
        self.longest = min(self.positions, self.max_tokens)  # tokens of a sequence
        self.reused_tokens = 0  # of prompts, since the start
        self._waiting: list[Sequence] = []
        self._places: list[Sequence | None] = []  # the first `running` run, the others are kept for reuse, or None
        self._running = 0
        self._clock = 0
        self._compiled = torch.compile(model.model, dynamic=True) if compile else None
        # for training, one shape: any other would be compiled too, and training itself soon not any more
        self._blocks_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        device = model.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        with torch.inference_mode():  # as all that fills it; a graph takes no tensors of another mode
            self._cache = KVCache(model.config, 0, 0, model.device, dtype)  # the first request says how long a place is
        self._graphs = DecodeGraphs() if (capturable(model, dtype) if graphs is None else graphs) else None
        self.forget()

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return self._running

    @property
    def capacity(self) -> int:
        """Sequences that can run at once when none is long."""
        return self.max_batch

    @property
    def free(self) -> int:
        """Places that nobody runs in."""
        return self.max_batch - self._running

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self._waiting or self._running)

    def add(self, prompt: list[int], sampling: Sampling = Sampling()) -> Sequence:  # noqa: B008 (it is frozen)
        """Queue a request. Raises ValueError when the prompt is empty, no tokens, or leaves no room for an answer."""
        if not prompt:
            raise ValueError("the prompt is empty")
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            raise ValueError(f"the prompt holds numbers that are none of the model's {self.model.config.vocab_size:,} "
                             "tokens")
        if len(prompt) >= self.longest:
            of_what = "the model's" if self.longest == self.positions else "the cache's"
            raise ValueError(f"a prompt of {len(prompt):,} tokens leaves no room for an answer in {of_what} "
                             f"{self.longest:,} positions")
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        sequence = Sequence(prompt, sampling, self.tokenizer)
        self._waiting.append(sequence)
        return sequence

    @torch.inference_mode()  # the cache is written in that mode only
    def cancel(self, sequence: Sequence) -> None:
        """End a request, at any moment between two steps. Its place is free at once; a finished one stays as it is."""
        if sequence.finish_reason is not None:
            return
        sequence._end("cancelled")
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)

    def forget(self) -> None:
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
            sequence._take(*result)
            if sequence.finish_reason is None and len(sequence._tokens) > self.longest:
                sequence._end("length")
        for sequence in reversed(ready):  # the last place first: those that leave together swap few places
            if sequence.finish_reason is not None:
                self._leave(sequence)
        return ready

    # -- the model -----------------------------------------------------------------------------------------------------

    def _answering(self) -> list[int]:
        """The places of which one token is to be read: the first ones, so that the cache is one slice."""
        count = 0
        for place in range(self._running):
            sequence = self._places[place]
            if len(sequence._tokens) - sequence._computed == 1:
                if place != count:
                    self._swap(place, count)
                count += 1
        self._reserve(max((len(s._tokens) for s in self._places[:count]), default=0))
        return list(range(min(count, self._running)))

    def _reading(self) -> list[int]:
        """The next places that still read their prompts, as many as fit a chunk when padded to the longest."""
        chosen: list[int] = []
        longest = 0
        for place, sequence in enumerate(self._places[:self._running]):
            left = len(sequence._tokens) - sequence._computed
            if left > 1:
                longest = max(longest, min(left, self.prefill_chunk))
                if chosen and (len(chosen) + 1) * longest > self.prefill_chunk:
                    break
                chosen.append(place)
        return chosen

    def _forward(self, places: list[int]) -> tuple[list[Sequence], Tensor]:
        """Read the next tokens of each place, at most a chunk. → those that have read all, and their logits [n, V]."""
        device, sequences = self.model.device, [self._places[place] for place in places]
        chunks = [s._tokens[s._computed:s._computed + self.prefill_chunk] for s in sequences]
        width = max(map(len, chunks))
        # padding repeats a row's last token at its own position: it writes what is there already
        positions = [[min(s._computed + column, s._computed + len(chunk) - 1) for column in range(width)]
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
            sequence._computed += len(chunk)
            if sequence._computed == len(sequence._tokens):
                done.append((row, len(chunk) - 1, sequence))
        rows, ends = [row for row, _, _ in done], [end for _, end, _ in done]
        last = hidden[:len(done), 0] if answering and len(done) == len(chunks) else hidden[rows, ends]
        return [sequence for _, _, sequence in done], self.model.lm_head(last)

    def _common_prefix_len(self, sequences: list[Sequence]) -> int:
        """How many tokens all that answer begin with, for attention to read once; 0 where that would not pay.

        In half precision neither: products would round the scores, which PyTorch's own kernel keeps in fp32.
        """
        tokens = [s._tokens for s in sequences]
        common = common_length(min(tokens), max(tokens))  # in their order all others lie between these two
        worth = common * (len(tokens) - 1) >= WORTH_SHARING and self._cache.keys[0].dtype == torch.float32
        return common if worth else 0

    def _draw(self, logits: Tensor, sequences: list[Sequence]) -> tuple[list[int], list[float], list]:
        """One token for each of the rows of `logits`, with log-probability and likeliest tokens."""
        if any(s.sampling.penalises for s in sequences):
            logits = logits.float()
        for row, sequence in enumerate(sequences):
            if sequence.sampling.penalises:
                if sequence._counts is None:
                    halves = (torch.tensor(ids, dtype=torch.long) for ids in (sequence.prompt, sequence.ids))
                    sequence._counts = torch.stack([half.bincount(minlength=logits.shape[1]) for half in halves])
                    sequence._counts = sequence._counts.to(logits.device)
                logits[row] = penalise(logits[row], sequence.sampling, *sequence._counts)
        return draw(logits, [s.sampling for s in sequences], [s._dice.random() for s in sequences])

    # -- places --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give places to those that wait, in turn, from copies of what was computed for others where that helps."""
        for sequence in list(self._waiting):
            needed = len(sequence._tokens) + 1
            if needed > self._cache.length or self._running == len(self._places):
                longest = max([needed, *(len(s._tokens) + 1 for s in self._places[:self._running])])
                if self._places_at(self._length_for(longest)) <= self._running:
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
        limit = len(sequence._tokens) - 1  # the last token is always read: its logits are wanted
        for place, other in enumerate(self._places):
            if other is not None:
                common = min(common_length(sequence._tokens, other._tokens), limit)
                if common < WORTH_COPYING:
                    continue
                there = min(common, other._computed)
                if there > best:
                    best, source = there, place
                promised = max(promised, min(common, len(other.prompt)) if place < self._running else 0)
        return (None if promised > best else source), best

    def _enter(self, sequence: Sequence, source: int, common: int) -> None:
        """Place a sequence after the running ones, on `common` tokens that were computed for the one at `source`."""
        target, places = self._running, self._places
        victim = min(range(target, len(places)),
                     key=lambda place: (places[place]._left_at if places[place] else -1, place))
        if source >= target and common and (common == places[source]._computed or len(places) == target + 1):
            victim = source  # nobody else needs it: go on in its place
        if victim != target:
            self._swap(victim, target)
            source = target if source == victim else victim if source == target else source
        if common and source != target:
            self._cache.copy(source, target, common)
        places[target] = sequence
        sequence._computed = common
        sequence.reused = max(sequence.reused, min(common, len(sequence.prompt)))
        self.reused_tokens += common
        self._running += 1

    def _leave(self, sequence: Sequence) -> None:
        """Free a place: the last running sequence moves there, what was computed stays behind it."""
        sequence._left_at = self._clock
        sequence._counts = None
        self._running -= 1
        self._swap(self._places.index(sequence), self._running)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            pair = self._places[one], self._places[other]
            tokens, of_other = (s._tokens[:s._computed] if s else [] for s in pair)
            self._cache.swap(one, other, common_length(tokens, of_other), max(len(tokens), len(of_other)))
            self._places[other], self._places[one] = pair

    def _reserve(self, length: int) -> None:
        """Make places long enough; if fewer of them then fit the memory, the latest sequences wait again."""
        if length > self._cache.length:
            length = self._length_for(length)
            while self._running > self._places_at(length):
                self._running -= 1
                latest, self._places[self._running] = self._places[self._running], None
                latest._computed = 0
                self._waiting.insert(0, latest)
            self._resize(length)

    def _resize(self, length: int) -> None:
        places = self._places_at(length)
        if (places, length) != (self._cache.places, self._cache.length):
            self._cache.resize(places, length)
            if self._graphs is not None:
                self._graphs.forget()
            self._places = (self._places + [None] * places)[:places]
            for place, sequence in enumerate(self._places):
                if sequence is not None and sequence._computed > length:
                    self._places[place] = None

    def _length_for(self, tokens: int) -> int:
        """The length of places that hold so many tokens: it doubles, so that growing costs little in all."""
        length = min(SMALLEST_LENGTH, self.longest)
        while length < tokens:
            length *= 2
        return min(length, self.longest)

    def _places_at(self, length: int) -> int:
        return min(self.max_batch, self.max_tokens // length)


def common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def generate(model: nn.Module, prompts: list[list[int]], sampling: Sampling | list[Sampling],
             tokenizer: ChatTokenizer | None = None, **options) -> list[Sequence]:
    """Answer all prompts; `options` go to the Engine. With one Sampling, prompt i draws with seed + i."""
    if isinstance(sampling, Sampling):
        sampling = [replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
    engine = Engine(model, tokenizer, **options)
    sequences = [engine.add(*request) for request in zip(prompts, sampling, strict=True)]
    while engine.busy:
        engine.step()
    return sequences


def stream(model: nn.Module, prompt: list[int], sampling: Sampling, tokenizer: ChatTokenizer | None = None,
           **options) -> Iterator[Sequence]:
    """Answer one prompt: the same sequence after each of its tokens, the last time with its finish_reason."""
    engine = Engine(model, tokenizer, max_batch=1, **options)
    engine.add(prompt, sampling)
    while engine.busy:
        yield from engine.step()
