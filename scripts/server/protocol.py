"""OpenAI's protocol: what the body of a request may hold, and the shape of an error.

Sources: the API reference of OpenAI (chat completions, completions, errors) and, for thinking, the field
`reasoning_content` that DeepSeek introduced.
"""

import json
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.chat import parse_json

#: types of content parts that are text, and the field that holds it
TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
               "thinking": "thinking", "reasoning_text": "text", "summary_text": "text"}
THINKING = ("thinking", "reasoning_text", "summary_text")


class ApiError(Exception):
    """A response with OpenAI's error object: HTTP `status`, one line, the field it is about, a code for programs."""

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
    """Pydantic's errors as one line about the first field that has one."""

    def path(error: dict) -> tuple:
        """The field's path, without the members of unions that pydantic tried."""
        loc = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
        return tuple(part for part in loc if str(part)[:5] not in ("str", "list[", "bool", "liter", "Named", "Funct"))

    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0].get('ctx', {}).get('error', errors[0]['msg'])}")
    first = path(errors[0])  # of a union's errors, those of the member that was read the furthest
    field = max((path(error) for error in errors if path(error)[:len(first)] == first), key=len)
    param = ".".join(map(str, field))
    messages = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in errors if path(error) == field)
    return ApiError(400, f"{param}: {' or '.join(messages)}" if param else " or ".join(messages), param or None)


class StrictModel(BaseModel):
    """Types are not converted ("1" is no number); unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(StrictModel):
    include_usage: bool | None = None


TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # keys of JSON objects are text


class GenerationBody(StrictModel):
    """The fields that chat and plain completions share. null is the same as leaving a field out."""

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
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    guided_json: dict[str, Any] | None = None  # vLLM's names: a schema, or a regular expression, of the answer
    guided_regex: str | None = None

    @model_validator(mode="before")
    @classmethod
    def normalize(cls, body: Any) -> Any:
        """What clients write for "an integer", "no limit" and "no stop string": 32.0, -1 and ""."""
        if not isinstance(body, dict):
            return body
        body = {key: int(value) if isinstance(value, float) and value.is_integer() else value
                for key, value in body.items()}
        for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if body.get(key) == -1:
                body[key] = None
        if isinstance(stop := body.get("stop"), (str, list)):
            body["stop"] = [text for text in stop if text != ""] if isinstance(stop, list) else stop or None
        return body


class Part(StrictModel):
    """A part of a message's content: a text, or an assistant's refusal or thinking."""

    type: str
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None

    @model_validator(mode="after")
    def has_text(self) -> "Part":
        if self.type not in TEXT_FIELDS:
            raise ValueError(f"this model reads text only, not {self.type:.40}")
        if self.value is None:
            raise ValueError(f"a part of type {self.type} needs the field {TEXT_FIELDS[self.type]}")
        return self

    @property
    def value(self) -> str:
        return getattr(self, TEXT_FIELDS[self.type])


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's name of it
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None  # of a tool's result
    function_call: dict[str, Any] | None = None  # what OpenAI had before tool_calls
    audio: dict[str, Any] | None = None

    @model_validator(mode="after")
    def has_content(self) -> "Message":
        if self.audio is not None:
            raise ValueError("this model reads text only, not audio")
        if self.content is None and self.role not in ("assistant", "tool", "function"):
            raise ValueError(f"a {self.role} message needs content")
        if self.role != "assistant" and any(part.type in ("refusal", *THINKING) for part in self._parts):
            raise ValueError("refusals and thinking are only for assistant messages")
        return self

    @property
    def _parts(self) -> list[Part]:
        return self.content if isinstance(self.content, list) else [Part(type="text", text=self.content or "")]

    def to_dict(self) -> dict:
        """As model/chat.py takes it. Tool calls whose arguments are no JSON object become text, as they were sampled.
        """
        content = "".join(part.value for part in self._parts if part.type not in THINKING) or self.refusal or ""
        thinking = "".join(part.value for part in self._parts if part.type in THINKING)
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        calls = []
        for call in self.tool_calls or [self.function_call] * bool(self.function_call):
            text = malformed_call_text(call)
            if text is None:
                calls.append(call)
            else:
                content += "\n" * bool(content) + f"<tool_call>\n{text}\n</tool_call>"
        message = {"role": {"developer": "system", "function": "tool"}.get(self.role, self.role), "content": content,
                   "reasoning_content": thinking or None if reasoning is None else reasoning, "tool_calls": calls}
        return {key: value for key, value in message.items() if key in ("role", "content") or value not in (None, [])}


def sort_tool_results(messages: list[Message]) -> list[Message]:
    """Each turn's results in the order of its calls, by which alone the chat format tells whose they are.

    Results of calls that the turn has not made stay where they are.
    """
    ordered: list[Message] = []
    for is_result, group in groupby(messages, key=lambda message: message.role == "tool"):
        run = list(group)
        call_ids = [call.get("id") for call in ordered[-1].tool_calls or []] if is_result and ordered else []
        if is_result and all(message.tool_call_id in call_ids for message in run):
            run.sort(key=lambda message, call_ids=call_ids: call_ids.index(message.tool_call_id))
        ordered += run
    return ordered


def malformed_call_text(call: dict) -> str | None:
    """The text of a tool call whose arguments are no JSON object; None for any other."""
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, dict) else None
    try:
        parse_json(arguments or {}, "arguments", dict)
        return None
    except ValueError:
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return f'{{"name": {json.dumps(function.get("name"), ensure_ascii=False)}, "arguments": {arguments}}}'


class Function(StrictModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Tool(StrictModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function

    def to_dict(self) -> dict:
        """As the model reads it: without null, and without `strict`, which is for the sampler."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedTool(StrictModel):
    type: Literal["function"]
    function: Function


class TemplateOptions(StrictModel):
    open_thinking: bool | Literal[0, 1] | None = None
    enable_thinking: bool | Literal[0, 1] | None = None


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # OpenAI's switch for thinking


class JsonSchema(StrictModel):
    value: dict[str, Any] = Field({"type": "object"}, alias="schema")


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_value(self) -> dict | None:
        """The JSON schema of the answer; None: it is text."""
        return None if self.type == "text" else (self.json_schema or JsonSchema()).value


class ChatBody(GenerationBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = None  # what OpenAI had before tools
    function_call: Literal["auto", "none"] | Function | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    open_thinking: bool | Literal[0, 1] | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def check_consistency(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise ValueError("continue_final_message and add_generation_prompt must not have the same value")
        self.messages = sort_tool_results(self.messages)
        if self.functions and self.tools:
            raise ValueError("send either functions or tools, not both")
        if self.functions:
            self.tools = [Tool(type="function", function=function) for function in self.functions]
            self.tool_choice = (NamedTool(type="function", function=self.function_call)
                                if isinstance(self.function_call, Function) else self.function_call)
        return self

    @property
    def named_tool(self) -> str | None:
        """The one tool that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def call_required(self) -> bool:
        return self.tool_choice == "required" or self.named_tool is not None


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
