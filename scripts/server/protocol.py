"""OpenAI's protocol: what a request may hold, what it asks of the engine, and the shapes of an answer.

Sources: the API reference of OpenAI (chat completions, completions, errors) and, for thinking, the field
`reasoning_content` that DeepSeek introduced. No HTTP here: `serve_openai_api.py` carries these shapes over the wire.
"""

import json
import secrets
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.chat import BOS, ChatTokenizer, MessageParser
from model.inference.engine import SamplingParams
from scripts.server.engine_thread import Progress

MOST_CHOICES = 1024  # of one request: many small prompts cost more memory than their text
IMPOSSIBLE = -9999.0  # JSON has no infinity; OpenAI writes this for a token that cannot be drawn


class ApiError(Exception):
    """An answer in OpenAI's error object: HTTP `status`, one line, the field it is about, a code for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = " ".join(self.message.encode("utf-8", "replace").decode().split())
        param = self.param and self.param.encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def validation_error(errors: list[dict]) -> ApiError:
    """What pydantic found wrong, as one line about the first field that is."""

    def where(error: dict) -> tuple:
        loc = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
        end = next((i for i, part in enumerate(loc) if i and str(part)[:5] in ("str", "list[", "bool", "liter")), None)
        return loc[:end]

    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0].get('ctx', {}).get('error', errors[0]['msg'])}")
    place = where(errors[0])
    said = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in errors if where(error) == place)
    param = ".".join(map(str, place))
    return ApiError(400, f"{param}: {' or '.join(said)}" if param else " or ".join(said), param or None)


# -- requests ----------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """Types are taken as they are written ("1" is no number); fields that are not known are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class AnyRequest(Body):
    """What chat and plain completions share. null is the same as leaving a field out."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=16)
    logit_bias: dict[str, Any] | None = None

    @model_validator(mode="after")
    def refuse_what_would_be_ignored(self) -> "AnyRequest":
        if self.logit_bias:
            raise ValueError("logit_bias is not supported")
        if isinstance(self.stop, str) and not self.stop:
            raise ValueError("stop: a stop string is not empty")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message has content")
        return self

    def plain(self) -> dict:
        """As model/chat.py takes it."""
        return self.model_dump(exclude_none=True) | ({"role": "system"} if self.role == "developer" else {})


class Function(Body):
    model_config = ConfigDict(extra="allow")
    name: str


class Tool(Body):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class TemplateOptions(Body):
    open_thinking: bool | Literal[0, 1] | None = None
    enable_thinking: bool | Literal[0, 1] | None = None


class ResponseFormat(Body):
    type: Literal["text"]


class ChatRequest(AnyRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    open_thinking: bool | Literal[0, 1] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def logprobs_are_asked_for(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(AnyRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


# -- what a request asks of the engine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing; `model` is the name that clients give."""

    model: str = "minimind"
    max_new_tokens: int = 1024
    temperature: float = 0.85
    top_p: float = 0.95
    open_thinking: bool = False


@dataclass
class Job:
    """A request, ready for the engine: a prompt, a sampling and the choice they become, one each of every list."""

    kind: str  # the answer's "object"
    model: str
    prompts: list[list[int]]
    samplings: list[SamplingParams]
    choices: list["ChatChoice | TextChoice"]
    prompt_tokens: int  # a prompt of n choices counts once
    stream: bool
    include_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


def samplings_of(request: AnyRequest, defaults: Defaults, count: int, top_logprobs: int | None,
                 longest: int | None = None) -> list[SamplingParams]:
    """The sampling of each of `count` choices; choice i draws with the seed + i."""

    def given(name: str, otherwise: Any) -> Any:
        value = getattr(request, name)
        return otherwise if value is None else value

    seed = given("seed", secrets.randbits(62))
    stop = given("stop", ())
    shared = {
        "max_new_tokens": longest or given("max_tokens", defaults.max_new_tokens),
        "temperature": given("temperature", defaults.temperature), "top_p": given("top_p", defaults.top_p),
        "top_k": max(given("top_k", 0), 0), "min_p": given("min_p", 0.0),
        "presence_penalty": given("presence_penalty", 0.0), "frequency_penalty": given("frequency_penalty", 0.0),
        "repetition_penalty": given("repetition_penalty", 1.0),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop), "top_logprobs": top_logprobs,
    }
    return [SamplingParams(**shared, seed=(seed + i) % 2**63) for i in range(count)]


def chat_job(request: ChatRequest, tokenizer: ChatTokenizer, defaults: Defaults) -> Job:
    """The job of a chat request. Raises ApiError when its messages or tools cannot be written in the chat format."""
    template = request.chat_template_kwargs or TemplateOptions()
    wishes = (request.open_thinking, template.open_thinking, template.enable_thinking, defaults.open_thinking)
    thinks = bool(next(wish for wish in wishes if wish is not None))
    tools = [tool.model_dump() for tool in request.tools or []] if request.tool_choice != "none" else []
    try:
        prompt = tokenizer.prompt([message.plain() for message in request.messages], tools, thinks)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    n = request.n or 1
    top = request.top_logprobs or None
    samplings = samplings_of(request, defaults, n, top, request.max_completion_tokens)
    choices = [ChatChoice(i, tokenizer, thinks, bool(tools), bool(request.logprobs)) for i in range(n)]
    return Job("chat.completion", defaults.model, [prompt] * n, samplings, choices, len(prompt),
               bool(request.stream), bool(request.stream_options and request.stream_options.include_usage))


def completion_job(request: CompletionRequest, tokenizer: ChatTokenizer, defaults: Defaults) -> Job:
    """The job of a plain completion: text follows `<|im_start|>`, as in pretraining; token ids are taken as given."""
    prompts = request.prompt
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    rows = [prompt if isinstance(prompt, list) else [BOS, *tokenizer.encode_text(prompt)] for prompt in prompts]
    if not rows or not all(rows):
        raise ApiError(400, "prompt: it is empty", "prompt")
    if any(not 0 <= i < tokenizer.vocab_size for row in rows for i in row):
        raise ApiError(400, f"prompt: token ids are 0 to {tokenizer.vocab_size - 1}", "prompt")
    n = request.n or 1
    if n * len(rows) > MOST_CHOICES:
        raise ApiError(400, f"prompt: {n * len(rows):,} answers, the most is {MOST_CHOICES:,} a request", "prompt")
    samplings = samplings_of(request, defaults, n * len(rows), request.logprobs or None)
    choices = [TextChoice(i, tokenizer, request.logprobs is not None) for i in range(n * len(rows))]
    return Job("text_completion", defaults.model, [row for row in rows for _ in range(n)], samplings, choices,
               sum(map(len, rows)), bool(request.stream),
               bool(request.stream_options and request.stream_options.include_usage))


# -- answers -----------------------------------------------------------------------------------------------------------


class ChatChoice:
    """One choice of a chat answer. Sampled ids become deltas; what they add up to is its message."""

    def __init__(self, index: int, tokenizer: ChatTokenizer, thinks: bool, calls: bool, wants_logprobs: bool):
        self.index, self.tokenizer, self.finish_reason = index, tokenizer, None
        self.said: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
        self.logprobs: list[dict] | None = [] if wants_logprobs else None
        self._parser, self._calls = MessageParser(tokenizer, thinks), calls

    def start(self) -> dict:
        return self._chunk({"role": "assistant", "content": ""}, [])

    def advance(self, progress: Progress) -> Iterator[dict]:
        """The next chunks of this choice."""
        entries = []
        if self.logprobs is not None:
            entries = [chat_logprob(self.tokenizer, *token) for token in progress.tokens]
            self.logprobs += entries
        events = [*self._parser.feed(progress.said), *(self._parser.finish() if progress.finish_reason else ())]
        for delta in self._deltas(events):
            yield self._chunk(delta, entries)
            entries = []
        if progress.finish_reason:
            called = progress.finish_reason == "stop" and self.said["tool_calls"]
            self.finish_reason = "tool_calls" if called else progress.finish_reason
        if entries or self.finish_reason:
            yield self._chunk({}, entries)

    def _deltas(self, events: list[tuple[str, Any]]) -> Iterator[dict]:
        for kind, value in events:
            if kind == "tool_call" and self._calls:
                index, function = len(self.said["tool_calls"]), {"name": value["name"], "arguments": ""}
                call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
                arguments = json.dumps(value["arguments"], ensure_ascii=False)
                self.said["tool_calls"].append(call | {"function": function | {"arguments": arguments}})
                yield {"tool_calls": [{"index": index, **call}]}
                yield {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}
                continue
            if kind in ("tool_call", "malformed"):  # what is no call to this client is text
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                kind, value = "content", "\n" * bool(self.said["content"]) + f"<tool_call>\n{text}\n</tool_call>"
            name = "reasoning_content" if kind == "reasoning" else "content"
            self.said[name] += value
            yield {name: value}

    def _chunk(self, delta: dict, entries: list[dict]) -> dict:
        logprobs = {"content": entries, "refusal": None} if entries else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def whole(self) -> dict:
        """The finished choice."""
        message = {"role": "assistant", "content": self.said["content"], "refusal": None}
        if self.said["reasoning_content"]:
            message["reasoning_content"] = self.said["reasoning_content"]
        if self.said["tool_calls"]:
            message |= {"tool_calls": self.said["tool_calls"], "content": self.said["content"] or None}
        logprobs = None if self.logprobs is None else {"content": self.logprobs, "refusal": None}
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


class TextChoice:
    """One choice of a plain completion: the engine's text, in pieces or whole."""

    def __init__(self, index: int, tokenizer: ChatTokenizer, wants_logprobs: bool):
        self.index, self.tokenizer, self.finish_reason, self.text = index, tokenizer, None, ""
        self.logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._wants_logprobs, self._offset = wants_logprobs, 0

    def start(self) -> None:
        """A plain completion has no first chunk."""

    def advance(self, progress: Progress) -> Iterator[dict]:
        """The next chunk of this choice, if there is something to say."""
        piece = "".join(said for said in progress.said if isinstance(said, str))
        self.text += piece
        self.finish_reason = progress.finish_reason
        entries = {key: [] for key in self.logprobs}
        if self._wants_logprobs:
            for token, logprob, top in progress.tokens:
                name = token_text(self.tokenizer, token)
                likely = {token_text(self.tokenizer, i): max(value, IMPOSSIBLE) for i, value in top}
                for key, value in zip(entries, (name, logprob, likely, self._offset), strict=True):
                    entries[key].append(value)
                    self.logprobs[key].append(value)
                self._offset += len(name)
        if piece or self.finish_reason or entries["tokens"]:
            yield {"index": self.index, "text": piece, "logprobs": entries if self._wants_logprobs else None,
                   "finish_reason": self.finish_reason}

    def whole(self) -> dict:
        """The finished choice."""
        return {"index": self.index, "text": self.text, "logprobs": self.logprobs if self._wants_logprobs else None,
                "finish_reason": self.finish_reason}


def token_text(tokenizer: ChatTokenizer, token: int) -> str:
    return tokenizer.token_bytes[token].decode("utf-8", "replace")


def chat_logprob(tokenizer: ChatTokenizer, token: int, logprob: float, top: list[tuple[int, float]]) -> dict:
    """A token, its log-probability in nats, and the likeliest tokens of its place, in the shape of chat answers."""

    def shape(token: int, logprob: float) -> dict:
        return {"token": token_text(tokenizer, token), "logprob": max(logprob, IMPOSSIBLE),
                "bytes": list(tokenizer.token_bytes[token])}

    return shape(token, logprob) | {"top_logprobs": [shape(*likely) for likely in top]}


def envelope(job: Job, choices: list[dict], usage: dict | None, chunk: bool = False) -> dict:
    """The object around choices: a whole answer, or one chunk of it."""
    prefix, suffix = ("chatcmpl-", ".chunk" * chunk) if job.kind == "chat.completion" else ("cmpl-", "")
    answer = {"id": prefix + job.id, "object": job.kind + suffix, "created": job.created, "model": job.model,
              "choices": choices}
    return answer if chunk and not job.include_usage else answer | {"usage": usage}


def usage_of(job: Job, completion_tokens: int, cached_tokens: int) -> dict:
    return {"prompt_tokens": job.prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": job.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens}}
