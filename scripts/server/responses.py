"""OpenAI's Responses API, stateless: input items become a chat, and the chunks of its choice become output items.

    ResponsesBody ─ to_chat_body ─→ ChatBody ─ from_chat_body ─→ ResponsesRequest ─→ as any GenerationRequest
    output items ←──────────────────────────── ResponsesRequest.events ←─ chunks

Nothing is stored: each request holds the whole conversation. Only the latest output items stay in memory, because the
AI SDK refers to them by id instead of sending them again. Source: OpenAI's API reference (responses, streaming).
"""

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from model.chat import ChatTokenizer, check_text
from scripts.server.generation import Defaults, GenerationRequest, first_given
from scripts.server.protocol import (
    ApiError,
    ChatBody,
    GenerationBody,
    Part,
    ReasoningEffort,
    StrictModel,
    validation_error,
)

STATEFUL = ("previous_response_id", "conversation", "prompt", "background")  # fields that need a store
TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}  # by type of item


class InputItem(StrictModel):
    """A message, a tool call, a tool's result, or an assistant's reasoning."""

    type: str | None = None
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None

    @model_validator(mode="after")
    def is_known(self) -> "InputItem":
        required = {"message": ("role", "content"), "function_call": ("name",), "function_call_output": ("output",),
                    "reasoning": (), "item_reference": ("id",)}.get(self.type or "message")
        if required is None:
            raise ValueError(f"this server reads messages, function calls and reasoning, not {self.type:.40}")
        if missing := [name for name in required if getattr(self, name) is None]:
            raise ValueError(f"{self.type or 'message'} has no {missing[0]}")
        return self


class ResponseTool(StrictModel):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def is_function(self) -> "ResponseTool":
        if self.type != "function" or self.name is None:
            raise ValueError(f"this server has functions with a name, not {self.type:.40}")
        return self


class TextFormat(StrictModel):
    type: str
    name: str | None = None
    value: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def has_schema(self) -> "TextFormat":
        if self.type == "json_schema" and (self.name is None or self.value is None):
            raise ValueError("a json_schema has a name and a schema")
        return self

    def to_dict(self) -> dict:
        """As OpenAI writes it."""
        fields = self.model_dump(by_alias=True)
        return fields if self.type == "json_schema" else {"type": self.type}


class ResponseText(StrictModel):
    format: TextFormat | None = None


class Reasoning(StrictModel):
    effort: ReasoningEffort | None = None


class ResponsesBody(GenerationBody):
    n: Literal[1] | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    tools: list[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseText | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] | None = None
    store: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None

    @model_validator(mode="after")
    def can_be_answered(self) -> "ResponsesBody":
        for name in STATEFUL:
            if getattr(self, name):
                raise ValueError(f"{name}: nothing is stored here; send the whole conversation as input")
        for name in ("metadata", "tools", "text"):  # what a response repeats
            check_text(json.dumps(self.model_dump(include={name}), ensure_ascii=False))
        return self

    def to_chat_body(self, recent: "RecentItems") -> ChatBody:
        """The same request to chat completions. Raises ApiError, or pydantic's ValidationError."""
        body = self.model_dump(include=GenerationBody.model_fields.keys() - {"logit_bias"})
        tool_choice = self.tool_choice
        if isinstance(tool_choice, dict) and "name" in tool_choice:
            tool_choice = {"type": tool_choice.get("type"), "function": {"name": tool_choice["name"]}}
        response_format = self.text and self.text.format and self.text.format.to_dict()
        if response_format and response_format["type"] == "json_schema":
            response_format = {"type": "json_schema", "json_schema": response_format}
        has_logprobs = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        return ChatBody.model_validate(body | {
            "messages": self._messages(recent), "logit_bias": self.logit_bias, "max_tokens": self.max_output_tokens,
            "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or []],
            "tool_choice": tool_choice, "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": response_format, "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": has_logprobs, "top_logprobs": self.top_logprobs})

    def _messages(self, recent: "RecentItems") -> list[dict]:
        """The items as messages. What an assistant thought, wrote and called in a row is one message."""
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for item in items:
            if item.type == "item_reference":
                item = InputItem.model_validate(recent.get(item.id))
            if item.type == "function_call_output":
                messages.append({"role": "tool", "content": to_content(item.output)})
                continue
            if item.type in (None, "message") and item.role != "assistant":
                messages.append({"role": item.role, "content": to_content(item.content)})
                continue
            turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
            if turn is None or item.type != "function_call" and (turn["content"] or turn["tool_calls"]):
                turn = {"role": "assistant", "content": "", "reasoning": None, "tool_calls": []}
                messages.append(turn)
            if item.type == "function_call":
                turn["tool_calls"].append({"name": item.name, "arguments": item.arguments})
            elif item.type == "reasoning":
                parts = item.content if isinstance(item.content, list) else item.summary or []
                turn["reasoning"] = (turn["reasoning"] or "") + "".join(part.value for part in parts)
            else:
                turn["content"] = to_content(item.content)
        return messages


class RecentItems:
    """The latest output items of all responses that did not forbid it, by id, as far as `max_size` characters go."""

    def __init__(self, max_size: int = 2**24):
        self.max_size, self._size = max_size, 0
        self._items: dict[str, dict] = {}  # the oldest first

    def add(self, item: dict) -> None:
        self._items[item["id"]] = item
        self._size += len(str(item))
        while self._size > self.max_size:
            self._size -= len(str(self._items.pop(next(iter(self._items)))))

    def get(self, item_id: str) -> dict:
        """Raises ApiError for an item that is not there, or no longer."""
        try:
            return self._items[item_id]
        except KeyError:
            raise ApiError(400, f"input: item {item_id:.80} is not here, or no longer; send the whole conversation "
                                "(clients: store: false)", "input") from None


def to_content(content: str | list[Part]) -> str | list[dict]:
    return content if isinstance(content, str) else [part.model_dump(exclude_none=True) for part in content]


@dataclass(eq=False)
class ResponsesRequest(GenerationRequest):
    """A request to /v1/responses. `output`: its items so far, the last of which may be open."""

    body: ResponsesBody | None = None
    recent: RecentItems | None = None
    output: list[dict] = field(default_factory=list)
    status: str = "in_progress"
    num_events: int = 0
    end_of_stream = ""

    @classmethod
    def from_responses_body(cls, body: ResponsesBody, tokenizer: ChatTokenizer, defaults: Defaults,
                            recent: RecentItems) -> "ResponsesRequest":
        """Raises ApiError."""
        try:
            request = cls.from_chat_body(body.to_chat_body(recent), tokenizer, defaults)
        except ValidationError as error:
            raise validation_error(error.errors()) from None
        request.body, request.recent = body, recent
        return request

    async def events(self) -> AsyncIterator[dict]:
        """The events of the response's stream. Raises what the engine raised."""
        async with aclosing(self._events()) as events:
            async for event in events:
                yield self._numbered(event)

    def _numbered(self, event: dict) -> dict:
        self.num_events += 1
        return event | {"sequence_number": self.num_events - 1}

    async def _events(self) -> AsyncIterator[dict]:
        yield {"type": "response.created", "response": self.to_response()}
        yield {"type": "response.in_progress", "response": self.to_response()}
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                logprobs = (chunk["logprobs"] or {}).get("content", [])
                for event in self._add(chunk["delta"], logprobs):
                    yield event
        is_complete = self.choices[0].finish_reason != "length"
        if is_complete and all(item["type"] == "reasoning" for item in self.output):  # an answer without a text
            for event in self._add({"content": ""}, []):
                yield event
        for event in self._close("completed" if is_complete else "incomplete"):
            yield event
        self.status = "completed" if is_complete else "incomplete"
        if self.body.store is not False:
            for item in self.output:
                self.recent.add(item)
        yield {"type": f"response.{self.status}", "response": self.to_response()}

    def _add(self, delta: dict, logprobs: list[dict]) -> Iterator[dict]:
        """The events of one chunk of the chat."""
        for name, kind in (("reasoning_content", "reasoning"), ("content", "message")):
            if name in delta:
                if not self.output or self.output[-1]["type"] != kind:
                    yield from self._open(kind)
                part = self.output[-1]["content"][0]
                part["text"] += delta[name]
                extras = {}
                if kind == "message":
                    part["logprobs"] += logprobs
                    extras = {"logprobs": logprobs}
                yield self._item_event(f"{TEXT_EVENTS[kind]}.delta", content_index=0, delta=delta[name], **extras)
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                yield from self._open("function_call", call_id=call["id"], name=call["function"]["name"], arguments="")
            else:
                self.output[-1]["arguments"] += call["function"]["arguments"]
                yield self._item_event("response.function_call_arguments.delta", delta=call["function"]["arguments"])

    def _open(self, kind: str, **fields: Any) -> Iterator[dict]:
        """Append an item, after the end of the one before."""
        if self.output:
            yield from self._close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = {"type": kind, "id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **fields}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        self.output.append(item)
        yield self._output_event("response.output_item.added", item=item)
        if kind in TEXT_EVENTS:
            part = {"type": TEXT_EVENTS[kind].removeprefix("response."), "text": ""}
            part |= {"annotations": [], "logprobs": []} if kind == "message" else {}
            item["content"].append(part)
            yield self._item_event("response.content_part.added", content_index=0, part=part)

    def _close(self, status: str) -> Iterator[dict]:
        """End the last item."""
        if not self.output:
            return
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield self._item_event("response.function_call_arguments.done", name=item["name"],
                                   arguments=item["arguments"])
        else:
            part, = item["content"]
            logprobs = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._item_event(f"{TEXT_EVENTS[item['type']]}.done", content_index=0, text=part["text"], **logprobs)
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        yield self._output_event("response.output_item.done", item=item)

    def _output_event(self, kind: str, **fields: Any) -> dict:
        return {"type": kind, "output_index": len(self.output) - 1, **fields}

    def _item_event(self, kind: str, **fields: Any) -> dict:
        return self._output_event(kind, item_id=self.output[-1]["id"], **fields)

    def to_response(self) -> dict:
        """The response so far."""
        body, params = self.body, self.params[0]
        return {
            "id": f"resp_{self.id}", "object": "response", "created_at": self.created, "status": self.status,
            "model": self.model, "output": self.output, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "usage": None if self.status == "in_progress" else self._usage(),
            "temperature": params.temperature, "top_p": params.top_p, "max_output_tokens": body.max_output_tokens,
            "instructions": body.instructions, "metadata": body.metadata or {},
            "store": body.store is not False,
            "tools": [tool.model_dump() for tool in body.tools or []],
            "tool_choice": first_given(body.tool_choice, "auto"), "background": False, "truncation": "disabled",
            "parallel_tool_calls": first_given(body.parallel_tool_calls, True), "previous_response_id": None,
            "text": {"format": body.text.format.to_dict() if body.text and body.text.format else {"type": "text"}},
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "top_logprobs": body.top_logprobs or 0}

    def error_event(self, error: ApiError) -> dict:
        self.status = "failed"
        failure = {"code": "server_error", "message": error.message}
        return self._numbered({"type": "response.failed", "response": self.to_response() | {"error": failure}})

    def _usage(self) -> dict:
        usage = self.usage()
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens_details": usage["completion_tokens_details"]}
