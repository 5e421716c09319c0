"""OpenAI's Responses API, stateless: input items become a chat, and the chunks of its choice become output items.

    ResponsesBody ─ to_chat_body ─→ ChatBody ─ from_chat_body ─→ ResponsesRequest ─→ as any GenerationRequest
    output items ←──────────────────────────── ResponsesRequest.events ←─ chunks

Nothing is stored: each request holds the whole conversation. Only the latest output items stay in memory, because the
AI SDK refers to them by id instead of sending them again. Source: OpenAI's API reference (responses, streaming).
"""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from model.chat import ChatTokenizer
from scripts.server.generation import Defaults, GenerationRequest, first_given
from scripts.server.protocol import ApiError, validation_error
from scripts.server.responses_body import ResponsesBody

TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}  # by type of item


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
            raise ApiError(400, f"input: item {item_id:.80} is not in memory (any more); send the whole conversation "
                                "(clients: store: false)", "input") from None


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
            request = cls.from_chat_body(body.to_chat_body(recent.get), tokenizer, defaults)
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
        logprobs: list[dict] = []  # of tokens that have not become text yet, as the first bytes of a character
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                logprobs += (chunk["logprobs"] or {}).get("content", [])
                for event in self._add(chunk["delta"], logprobs):
                    yield event
                logprobs = [] if chunk["delta"] else logprobs
        if self.output and self.output[-1]["type"] == "message":
            self.output[-1]["content"][0]["logprobs"] += logprobs
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
