"""What the body of a request to /v1/responses may hold, and what that is as a chat."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.chat import check_text
from scripts.server.protocol import ChatBody, GenerationBody, Part, ReasoningEffort, StrictModel

STATEFUL = ("previous_response_id", "conversation", "prompt", "background")  # fields that need a store


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
            raise ValueError(f"only messages, function calls and reasoning are supported, not {self.type:.40}")
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
            raise ValueError(f"a tool needs the type function and a name; this one has the type {self.type:.40}")
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
            raise ValueError("a json_schema format needs a name and a schema")
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
        if isinstance(self.tool_choice, dict):  # some clients write it as for chat completions
            function = self.tool_choice.get("function")
            name = (function if isinstance(function, dict) else self.tool_choice).get("name")
            self.tool_choice = {"type": self.tool_choice.get("type"), "name": name}
        return self

    def to_chat_body(self, find_item: Callable[[str], dict]) -> ChatBody:
        """The same request to chat completions; `find_item`: id → item. Raises pydantic's ValidationError."""
        body = self.model_dump(include=GenerationBody.model_fields.keys() - {"logit_bias"})
        tool_choice = self.tool_choice
        if isinstance(tool_choice, dict):
            tool_choice = {"type": tool_choice["type"], "function": {"name": tool_choice["name"]}}
        response_format = self.text and self.text.format and self.text.format.to_dict()
        if response_format and response_format["type"] == "json_schema":
            response_format = {"type": "json_schema", "json_schema": response_format}
        has_logprobs = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        return ChatBody.model_validate(body | {
            "messages": self._messages(find_item), "logit_bias": self.logit_bias, "max_tokens": self.max_output_tokens,
            "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or []],
            "tool_choice": tool_choice, "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": response_format, "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": has_logprobs, "top_logprobs": self.top_logprobs})

    def _messages(self, find_item: Callable[[str], dict]) -> list[dict]:
        """The items as messages. What an assistant thought, wrote and called in a row is one message."""
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for item in items:
            if item.type == "item_reference":
                item = InputItem.model_validate(find_item(item.id))
            if item.type == "function_call_output":
                messages.append({"role": "tool", "content": to_content(item.output), "tool_call_id": item.call_id})
                continue
            if item.type in (None, "message") and item.role != "assistant":
                messages.append({"role": item.role, "content": to_content(item.content)})
                continue
            turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
            if turn is None or item.type != "function_call" and (turn["content"] or turn["tool_calls"]):
                turn = {"role": "assistant", "content": "", "reasoning": None, "tool_calls": []}
                messages.append(turn)
            if item.type == "function_call":
                turn["tool_calls"].append({"id": item.call_id, "name": item.name, "arguments": item.arguments})
            elif item.type == "reasoning":
                parts = item.content if isinstance(item.content, list) else item.summary or []
                turn["reasoning"] = (turn["reasoning"] or "") + "".join(part.value for part in parts)
            else:
                turn["content"] = to_content(item.content)
        return messages


def to_content(content: str | list[Part]) -> str | list[dict]:
    return content if isinstance(content, str) else [part.model_dump(exclude_none=True) for part in content]
