"""Where the web demo's answers come from: a model of this machine, or any OpenAI-compatible URL.

Both yield the same events; a `Reply` collects them in a thread of its own, so that what a person clicks meanwhile does
not interrupt it.
"""

import time
from collections.abc import Iterator
from threading import Thread

from torch import nn

from model.chat import BOS, AssistantMessage, ChatTokenizer, MessageParser
from model.cli import first_line
from model.inference.engine import Engine, SamplingParams
from scripts.lib.openai_client import ChatClient, Event

SECONDS_UNWATCHED = 60  # that an answer goes on while no page shows it


class LocalModel:
    """A model on this machine. All pages share its engine, and its batches."""

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer, continues_text: bool = False):
        self.tokenizer, self.continues_text = tokenizer, continues_text
        self.engine = Engine(model, tokenizer, max_batch=8, adapt_threads=True)

    def answer(self, messages: list[dict], tools: list[dict], thinking: bool,
               params: SamplingParams) -> Iterator[Event]:
        """Events of the answer to `messages`; a model that only continues text goes on with the last of them."""
        if self.continues_text:
            thinking, prompt = False, [BOS, *self.tokenizer.encode_text(messages[-1]["content"])]
        else:
            prompt = self.tokenizer.prompt(messages, tools, thinking)
        parser = MessageParser(self.tokenizer, thinking)
        for delta in self.engine.stream(self.engine.add(prompt, params)):
            yield "tokens", delta.num_tokens
            yield from parser.feed(delta.pieces)
        yield from parser.finish()
        yield "end", delta.finish_reason


class RemoteModel:
    """A model behind an OpenAI-compatible URL; without a name, the first that the server lists."""

    continues_text = False

    def __init__(self, base_url: str, api_key: str = "", name: str = ""):
        self.client = ChatClient(base_url, api_key, name, max_retries=0, timeout=60)

    def answer(self, messages: list[dict], tools: list[dict], thinking: bool,
               params: SamplingParams) -> Iterator[Event]:
        """Events of the answer to `messages`."""
        extras = {}  # fields that OpenAI's schema lacks, only when asked for: strict servers reject them
        if thinking:
            extras["chat_template_kwargs"] = {"open_thinking": True, "enable_thinking": True}
        if params.top_k:
            extras["top_k"] = params.top_k
        if params.repetition_penalty != 1:
            extras["repetition_penalty"] = params.repetition_penalty
        return self.client.stream(messages, tools, temperature=params.temperature, top_p=params.top_p,
                                  seed=params.seed, max_tokens=params.max_new_tokens, extra_body=extras)


class Reply:
    """An answer that is being written: read `message()` at any time, until `done`."""

    def __init__(self, events: Iterator[Event]):
        self.answer, self.num_tokens, self.reason, self.error = AssistantMessage(), 0, None, None
        self.done = self._stopped = False
        self.start = self.last_watched = time.perf_counter()
        self.first_token = self.last_token = self.thinking_seconds = None
        Thread(target=self._receive, args=(events,), daemon=True).start()

    def stop(self) -> None:
        """End the answer here; the text so far is kept."""
        self._stopped, self.reason = True, "cancelled"

    @property
    def running(self) -> bool:
        return not (self.done or self._stopped)

    def message(self) -> dict:
        """The answer so far as a message of the chat format, with the `stats` that the page shows about it."""
        seconds = self.last_token - self.first_token if self.last_token else 0
        stats = {"tokens": self.num_tokens, "time_to_first_token": self.first_token and self.first_token - self.start,
                 "finish_reason": self.reason, "thinking_seconds": self.thinking_seconds,
                 "malformed": list(self.answer.malformed),
                 "speed": (self.num_tokens - 1) / seconds if seconds and self.num_tokens > 1 else None}
        return self.answer.to_dict() | {"stats": stats}

    def _receive(self, events: Iterator[Event]) -> None:
        try:
            for kind, value in events:
                if self._stopped or time.perf_counter() - self.last_watched > SECONDS_UNWATCHED:
                    self.stop()
                    return
                self._add(kind, value)
        except Exception as error:  # nobody else would hear of it in this thread
            self.error = first_line(error)
        finally:
            events.close()
            self.done = True

    def _add(self, kind: str, value: object) -> None:
        """Take one event into the answer."""
        answer, now = self.answer, time.perf_counter()
        if kind == "end":
            self.reason = value
        elif kind == "tokens":
            self.num_tokens += value
            if value > 0:
                self.first_token, self.last_token = self.first_token or now, now
        elif kind == "reasoning":
            answer.reasoning += value
        else:
            if answer.reasoning and self.thinking_seconds is None:
                self.thinking_seconds = now - self.first_token
            if kind == "content":
                answer.content += value
            elif kind == "tool_call" and isinstance(value["arguments"], dict):
                answer.tool_calls.append(value)
            else:
                answer.malformed.append(f"{value['name']}({value['arguments']})" if kind == "tool_call" else value)
