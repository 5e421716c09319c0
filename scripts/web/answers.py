"""Where the web demo's answers come from: a model of this machine, or any OpenAI-compatible URL.

Both are asked the same way and answer with the same events; a `Reply` collects them in a thread of its own, so that
what a person clicks meanwhile does not interrupt it.
"""

import json
import time
from collections.abc import Iterator
from threading import Lock, Thread

from torch import nn

from model.chat import BOS, AssistantMessage, ChatTokenizer, MessageParser, parse_json
from model.cli import Failure, first_line
from model.inference.engine import Engine, Sampling

Event = tuple[str, object]  # MessageParser's, ("tokens", how many more) and ("end", why)
PATIENCE = 60  # seconds an answer goes on that nobody watches


class LocalModel:
    """A model on this machine. All pages share its engine: whoever waits for a token takes the next step for all."""

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer, continues_text: bool = False):
        self.tokenizer, self.continues_text = tokenizer, continues_text
        self.engine = Engine(model, tokenizer, max_batch=8)
        self._turn = Lock()

    def answer(self, messages: list[dict], tools: list[dict], thinking: bool, sampling: Sampling) -> Iterator[Event]:
        """Events of the answer to `messages`; a model that only continues text goes on with the last of them."""
        if self.continues_text:
            thinking, prompt = False, [BOS, *self.tokenizer.encode_text(messages[-1]["content"])]
        else:
            prompt = self.tokenizer.prompt(messages, tools, thinking)
        parser, seen = MessageParser(self.tokenizer, thinking), 0
        with self._turn:
            sequence = self.engine.add(prompt, sampling)
        try:
            while sequence.finish_reason is None:
                if self._turn.acquire(timeout=0.02):  # else another answer's step moves this one too
                    try:
                        if sequence.finish_reason is None:
                            self.engine.step()
                    finally:
                        self._turn.release()
                new = sequence.ids[seen:]
                if new:
                    seen += len(new)
                    yield "tokens", len(new)
                    yield from parser.feed(new)
            yield from parser.finish()
            yield "end", sequence.finish_reason
        finally:
            with self._turn:
                if sequence.finish_reason is None:
                    self.engine.cancel(sequence)


class RemoteModel:
    """A model behind an OpenAI-compatible URL; without a name, the first that the server lists."""

    continues_text = False

    def __init__(self, base_url: str, api_key: str = "", name: str = ""):
        self.base_url, self.api_key, self.name = base_url, api_key, name

    def answer(self, messages: list[dict], tools: list[dict], thinking: bool, sampling: Sampling) -> Iterator[Event]:
        """Events of the answer to `messages`. Raises Failure with what the server, or the way to it, complains of."""
        from openai import OpenAI, OpenAIError

        client = OpenAI(base_url=self.base_url, api_key=self.api_key or "none", timeout=60, max_retries=0)
        try:
            model = self.name or next(iter(client.models.list())).id
            body = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
                    "max_tokens": sampling.max_new_tokens, "extra_body": self._extras(thinking, sampling)}
            if tools:
                body["tools"] = tools
            with client.chat.completions.create(model=model, messages=openai_messages(messages), stream=True,
                                                stream_options={"include_usage": True}, **body) as chunks:
                yield from events_of(chunks)
        except StopIteration:
            raise Failure(f"{self.base_url} serves no model") from None
        except OpenAIError as error:
            raise Failure(f"{self.base_url}: {first_line(error)}") from None

    @staticmethod
    def _extras(thinking: bool, sampling: Sampling) -> dict:
        """What OpenAI's own schema lacks, only if asked for: strict servers refuse fields they do not know."""
        extras = {"chat_template_kwargs": {"open_thinking": True, "enable_thinking": True}} if thinking else {}
        if sampling.top_k:
            extras["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1:
            extras["repetition_penalty"] = sampling.repetition_penalty
        return extras


def events_of(chunks: Iterator) -> Iterator[Event]:
    """Events of OpenAI's chunks: text may hold markers of ours, arguments come in pieces, a chunk is about a token."""
    parser, calls, reason, told, counted = MessageParser(None), {}, None, None, 0
    for chunk in chunks:
        told = chunk.usage.completion_tokens if chunk.usage else told
        for choice in chunk.choices[:1]:
            delta, reason = choice.delta, choice.finish_reason or reason
            thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
            if thought or delta.content or delta.tool_calls:
                counted += 1
                yield "tokens", 1
            if thought:
                yield "reasoning", thought
            yield from parser.feed_text(delta.content or "")
            for piece in delta.tool_calls or ():
                call = calls.setdefault(piece.index, ["", ""])
                call[0] += piece.function.name or ""
                call[1] += piece.function.arguments or ""
    yield from parser.finish()
    for name, arguments in calls.values():
        try:
            yield "tool_call", {"name": name, "arguments": parse_json(arguments or {}, "arguments", dict)}
        except ValueError:
            yield "malformed", f"{name}({arguments})"
    if told is not None:
        yield "tokens", told - counted
    yield "end", reason


def openai_messages(messages: list[dict]) -> list[dict]:
    """Our messages as OpenAI's: calls have ids and arguments as text, and a result names the call it answers."""
    converted, open_calls = [], []
    for number, message in enumerate(messages):
        shape = {"role": message["role"], "content": message["content"]}
        if calls := message.get("tool_calls"):
            open_calls = [f"call_{number}_{i}" for i in range(len(calls))]
            shape["tool_calls"] = [
                {"id": name, "type": "function",
                 "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for name, call in zip(open_calls, calls, strict=True)]
        if message["role"] == "tool" and open_calls:
            shape["tool_call_id"] = open_calls.pop(0)
        converted.append(shape)
    return converted


class Reply:
    """An answer that is being written: read `message()` at any time, until `done`."""

    def __init__(self, events: Iterator[Event]):
        self.answer, self.tokens, self.reason, self.error = AssistantMessage(), 0, None, None
        self.done = self._stopped = False
        self.began = self.watched = time.perf_counter()
        self.first = self.last = self.thought = None
        Thread(target=self._receive, args=(events,), daemon=True).start()

    def stop(self) -> None:
        """End the answer here; what was said is kept."""
        self._stopped, self.reason = True, "cancelled"

    @property
    def running(self) -> bool:
        return not (self.done or self._stopped)

    def message(self) -> dict:
        """What was said so far as a message of the chat format, with the `facts` that the page tells about it."""
        seconds = self.last - self.first if self.last else 0
        facts = {"tokens": self.tokens, "wait": self.first and self.first - self.began, "reason": self.reason,
                 "speed": (self.tokens - 1) / seconds if seconds and self.tokens > 1 else None,
                 "thought": self.thought, "malformed": list(self.answer.malformed)}
        return self.answer.to_dict() | {"facts": facts}

    def _receive(self, events: Iterator[Event]) -> None:
        try:
            for kind, value in events:
                if self._stopped or time.perf_counter() - self.watched > PATIENCE:
                    self.stop()
                    return
                self._note(kind, value)
        except Exception as error:  # of a thread nobody else would hear
            self.error = first_line(error)
        finally:
            events.close()
            self.done = True

    def _note(self, kind: str, value: object) -> None:
        answer, now = self.answer, time.perf_counter()
        if kind == "end":
            self.reason = value
        elif kind == "tokens":
            self.tokens += value
            if value > 0:
                self.first, self.last = self.first or now, now
        elif kind == "reasoning":
            answer.reasoning += value
        else:
            if answer.reasoning and self.thought is None:
                self.thought = now - self.first
            if kind == "content":
                answer.content += value
            else:
                (answer.tool_calls if kind == "tool_call" else answer.malformed).append(value)
