"""OpenAI's protocol: what the body of a request may hold, and the shape of an error.

Sources: the API reference of OpenAI (chat completions, completions, errors) and, for thinking, the field
`reasoning_content` that DeepSeek introduced.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
        """The field's path, without the member of a union that pydantic tried."""
        loc = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
        end = next((i for i, part in enumerate(loc) if i and str(part)[:5] in ("str", "list[", "bool", "liter")), None)
        return loc[:end]

    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0].get('ctx', {}).get('error', errors[0]['msg'])}")
    param = ".".join(map(str, path(errors[0])))
    messages = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in errors
                             if path(error) == path(errors[0]))
    return ApiError(400, f"{param}: {' or '.join(messages)}" if param else " or ".join(messages), param or None)


class StrictModel(BaseModel):
    """Types are not converted ("1" is no number); unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(StrictModel):
    include_usage: bool | None = None


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
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=16)
    logit_bias: dict[str, Any] | None = None

    @model_validator(mode="after")
    def refuse_what_would_be_ignored(self) -> "GenerationBody":
        if self.logit_bias:
            raise ValueError("logit_bias is not supported")
        if isinstance(self.stop, str) and not self.stop:
            raise ValueError("stop: a stop string is not empty")
        return self


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message has content")
        return self

    def to_dict(self) -> dict:
        """As model/chat.py takes it."""
        return self.model_dump(exclude_none=True) | ({"role": "system"} if self.role == "developer" else {})


class Function(StrictModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Tool(StrictModel):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class TemplateOptions(StrictModel):
    open_thinking: bool | Literal[0, 1] | None = None
    enable_thinking: bool | Literal[0, 1] | None = None


class ResponseFormat(StrictModel):
    type: Literal["text"]


class ChatBody(GenerationBody):
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
    def has_logprobs_for_top_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
