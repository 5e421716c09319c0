"""One request inside the engine: its prompt, what has been sampled, and the text that may be shown."""

import codecs
import random
from typing import NamedTuple

from torch import Tensor

from model.chat import SPECIAL_TOKENS, ChatTokenizer
from model.inference.sampling import SamplingParams

ID_TO_TOKEN = {token_id: token for token, token_id in SPECIAL_TOKENS.items()}


class TokenDelta(NamedTuple):
    """What a sequence gained since its last delta."""

    pieces: list[str | int]  # of `Sequence.output_pieces`
    tokens: list[tuple[int, float, list[tuple[int, float]]]]  # id, logprob, top_logprobs; the stop token is left out
    num_tokens: int  # sampled, the stop token included
    finish_reason: str | None


class Sequence:
    """A prompt and its completion. `Engine.add` makes it, `Engine.step` extends it.

    `completion_ids` end with the stop token if there was one; `logprobs` (nats) belong to them, each under the
    distribution its token was sampled from. `finish_reason` is None while it runs, then "stop", "length" or
    "cancelled". `output_pieces` grows by what may be shown: text, never half a character or part of a stop string, and
    the ids of special tokens (`<think>`, …).
    """

    def __init__(self, prompt_ids: list[int], params: SamplingParams, tokenizer: ChatTokenizer | None):
        self.prompt_ids, self.params = list(prompt_ids), params
        self.completion_ids: list[int] = []
        self.token_ids = list(prompt_ids)  # prompt and completion
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.output_pieces: list[str | int] = []
        self.finish_reason: str | None = None
        self.num_cached_tokens = 0  # of the prompt: copied instead of computed
        # for the scheduler and the sampler
        self.num_computed = 0  # of token_ids: their keys and values are in the cache
        self.freed_at = 0  # the step in which it gave its slot free
        self.rng = random.Random(params.seed)
        self.grammar = params.grammar and params.grammar.copy()  # a copy that holds the state of this completion
        self.token_counts: Tensor | None = None  # [2, V]: occurrences in the prompt and in the completion
        # for the text
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending_text = ""  # may become a stop string
        self._num_tokens_sent = self._num_pieces_sent = 0  # in earlier deltas

    @property
    def text(self) -> str:
        """The completion's text that may be shown, special tokens left out."""
        return "".join(piece for piece in self.output_pieces if isinstance(piece, str))

    def append_token(self, token: int, logprob: float, top_logprobs: list[tuple[int, float]]) -> None:
        """Append a sampled token, emit the text that it completes, and finish where the params ask for that."""
        self.completion_ids.append(token)
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top_logprobs)
        if self.token_counts is not None:
            self.token_counts[1, token] += 1
        if self.grammar is not None and not self.grammar.accept(token):  # too complex for llguidance
            self.finish("length")
            return
        if token in self.params.stop_ids:
            self.finish("stop")
            return
        if self._tokenizer is not None:
            if self._tokenizer.num_special <= token < self._tokenizer.vocab_size:
                self._emit_text(self._utf8.decode(self._tokenizer.token_bytes[token]))
            elif token in ID_TO_TOKEN:
                self._utf8.reset()
                self._emit_text("", is_last=True)
                if ID_TO_TOKEN[token] in self.params.stop:
                    self.finish_reason = "stop"
                else:
                    self.output_pieces.append(token)
        if self.finish_reason is None and len(self.completion_ids) >= self.params.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """Nothing follows: text that was held back may be shown after all. Half a character may not."""
        self._emit_text("", is_last=True)
        self.finish_reason = reason

    def next_delta(self) -> TokenDelta:
        """What was appended since the last call. Safe to call while another thread appends."""
        finish_reason = self.finish_reason  # read first: it is set last
        start, end = self._num_tokens_sent, len(self.top_logprobs)
        new = zip(self.completion_ids[start:end], self.logprobs[start:end], self.top_logprobs[start:end], strict=True)
        pieces = self.output_pieces[self._num_pieces_sent:]
        self._num_tokens_sent, self._num_pieces_sent = end, self._num_pieces_sent + len(pieces)
        return TokenDelta(pieces, [token for token in new if token[0] not in self.params.stop_ids], end - start,
                          finish_reason)

    def _emit_text(self, text: str, is_last: bool = False) -> None:
        """Append text to the output, except an end that may become a stop string; finish before a stop string."""
        text, stops = self._pending_text + text, self.params.stop
        end = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
        is_stopped = end is not None
        if not is_stopped:
            held = 0 if is_last else max(
                (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            end = len(text) - held
        self._pending_text = "" if is_stopped else text[end:]
        if end:
            self.output_pieces.append(text[:end])
        if is_stopped:
            self.finish_reason = "stop"
