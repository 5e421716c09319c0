"""OpenAI's choices: what the engine samples becomes the chunks of a stream, and in the end one finished choice."""

import json
import uuid
from codecs import getincrementaldecoder
from collections.abc import Iterator
from typing import Any

from model.chat import ChatTokenizer, MessageParser
from model.inference.engine import TokenDelta

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for a token that cannot be sampled


class ChatChoice:
    """One choice of a chat completion: deltas of tokens become chunks, which add up to its message."""

    def __init__(self, index: int, tokenizer: ChatTokenizer, parser: MessageParser, has_tools: bool,
                 has_logprobs: bool, is_legacy: bool = False):
        self.index, self.tokenizer, self.has_tools, self.finish_reason = index, tokenizer, has_tools, None
        self.num_reasoning_tokens = 0
        self.is_legacy = is_legacy  # one `function_call`, as before `tool_calls`
        self.message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
        self.logprobs: list[dict] | None = [] if has_logprobs else None
        self._parser = parser

    def first_chunk(self) -> dict:
        return self._chunk({"role": "assistant", "content": ""}, [])

    def add(self, delta: TokenDelta) -> Iterator[dict]:
        """The next chunks of this choice."""
        entries = []
        self.num_reasoning_tokens += delta.num_tokens * (self._parser.section == "reasoning")
        if self.logprobs is not None:
            entries = [chat_logprob(self.tokenizer, *token) for token in delta.tokens]
            self.logprobs += entries
        events = [*self._parser.feed(delta.pieces), *(self._parser.finish() if delta.finish_reason else ())]
        for part in self._parts(events):
            yield self._chunk(part, entries)
            entries = []
        if delta.finish_reason:
            has_called = delta.finish_reason == "stop" and self.message["tool_calls"]
            call_reason = "function_call" if self.is_legacy else "tool_calls"
            self.finish_reason = call_reason if has_called else delta.finish_reason
        if entries or self.finish_reason:
            yield self._chunk({}, entries)

    def _parts(self, events: list[tuple[str, Any]]) -> Iterator[dict]:
        """The parser's events as parts of a message; a tool call comes as its name, then its arguments."""
        for kind, value in events:
            if kind == "tool_call" and self.has_tools and not (self.is_legacy and self.message["tool_calls"]):
                index, function = len(self.message["tool_calls"]), {"name": value["name"], "arguments": ""}
                call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
                arguments = json.dumps(value["arguments"], ensure_ascii=False)
                self.message["tool_calls"].append(call | {"function": function | {"arguments": arguments}})
                yield {"tool_calls": [{"index": index, **call}]}
                yield {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}
                continue
            if kind in ("tool_call", "malformed"):  # what is no call to this client is text
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                kind, value = "content", "\n" * bool(self.message["content"]) + f"<tool_call>\n{text}\n</tool_call>"
            name = "reasoning_content" if kind == "reasoning" else "content"
            self.message[name] += value
            yield {name: value}

    def _chunk(self, part: dict, entries: list[dict]) -> dict:
        logprobs = {"content": entries, "refusal": None} if entries else None
        if self.is_legacy and "tool_calls" in part:
            part = {"function_call": part["tool_calls"][0]["function"]}
        return {"index": self.index, "delta": part, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def to_response(self) -> dict:
        """The finished choice."""
        message = {"role": "assistant", "content": self.message["content"], "refusal": None}
        if self.message["reasoning_content"]:
            message["reasoning_content"] = self.message["reasoning_content"]
        if self.message["tool_calls"]:
            message |= {"tool_calls": self.message["tool_calls"], "content": self.message["content"] or None}
        if self.is_legacy and "tool_calls" in message:
            message["function_call"] = message.pop("tool_calls")[0]["function"]
        logprobs = None if self.logprobs is None else {"content": self.logprobs, "refusal": None}
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


class TextChoice:
    """One choice of a plain completion: the engine's text, in chunks or whole."""

    num_reasoning_tokens = 0

    def __init__(self, index: int, tokenizer: ChatTokenizer, has_logprobs: bool):
        self.index, self.tokenizer, self.finish_reason, self.text = index, tokenizer, None, ""
        self.logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._has_logprobs, self._offset = has_logprobs, 0
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def first_chunk(self) -> None:
        """A plain completion has none."""

    def add(self, delta: TokenDelta) -> Iterator[dict]:
        """The next chunk of this choice, unless nothing is new."""
        text = "".join(piece for piece in delta.pieces if isinstance(piece, str))
        self.text += text
        self.finish_reason = delta.finish_reason
        entries = {key: [] for key in self.logprobs}
        if self._has_logprobs:
            for token, logprob, top_logprobs in delta.tokens:
                name = token_name(self.tokenizer, token)
                top = {token_name(self.tokenizer, i): max(value, MIN_LOGPROB) for i, value in top_logprobs}
                for key, value in zip(entries, (name, logprob, top, self._offset), strict=True):
                    entries[key].append(value)
                    self.logprobs[key].append(value)
                if token >= self.tokenizer.num_special:  # the others are no part of the text
                    self._offset += len(self._decoder.decode(self.tokenizer.token_bytes[token]))
        if text or self.finish_reason or entries["tokens"]:
            yield self._response(text, entries)

    def to_response(self) -> dict:
        """The finished choice."""
        return self._response(self.text, self.logprobs)

    def _response(self, text: str, logprobs: dict) -> dict:
        return {"index": self.index, "text": text, "logprobs": logprobs if self._has_logprobs else None,
                "finish_reason": self.finish_reason}


def token_name(tokenizer: ChatTokenizer, token: int) -> str:
    """A token as plain completions write it: its text, or its bytes where they are no whole characters."""
    try:
        return tokenizer.token_bytes[token].decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes[token])


def token_text(tokenizer: ChatTokenizer, token: int) -> str:
    return tokenizer.token_bytes[token].decode("utf-8", "replace")


def chat_logprob(tokenizer: ChatTokenizer, token: int, logprob: float, top_logprobs: list[tuple[int, float]]) -> dict:
    """A token, its log-probability in nats, and the likeliest tokens in its place, as chat completions write them."""

    def entry(token: int, logprob: float) -> dict:
        return {"token": token_text(tokenizer, token), "logprob": max(logprob, MIN_LOGPROB),
                "bytes": list(tokenizer.token_bytes[token])}

    return entry(token, logprob) | {"top_logprobs": [entry(*top) for top in top_logprobs]}
