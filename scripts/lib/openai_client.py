"""A client of any OpenAI-compatible endpoint that speaks in the messages of our data files.

A message's tool calls are {"name", "arguments"}. The arguments of an answer are an object, or the text that came where
that is no JSON object: `call_tool` takes both, and tells the model what is wrong with the text.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import openai

from model.chat import MessageParser, parse_json
from model.cli import Failure, UserError, first_line

LOCAL_SERVER = "http://127.0.0.1:8998/v1"  # scripts/serve_openai_api.py
Event = tuple[str, object]  # of MessageParser, or ("tokens", how many more), or ("end", finish_reason)


def add_endpoint_args(parser: argparse.ArgumentParser, key_variable: str) -> None:
    """Flags that name a model behind a server; its key is in the environment's `key_variable`, too."""
    parser.add_argument("--base_url", default=LOCAL_SERVER, help="URL of the server (default: %(default)s)")
    parser.add_argument("--api_key", default=os.environ.get(key_variable), help=f"if needed (default: ${key_variable})")
    parser.add_argument("--model", default="minimind", help="name of the model there (default: %(default)s)")


class RequestRefused(UserError):
    """The endpoint rejects this one request (HTTP 400 or 422); it may accept the next."""


class ChatClient:
    """One model behind a URL; without a name, the first one that the server lists.

    Every call raises a Failure of one line when something goes wrong: a UserError when no server answers or it rejects
    the request (HTTP 4xx). `send_reasoning`: send the thinking of earlier turns too, which OpenAI's schema does not
    have and strict servers reject.
    """

    def __init__(self, base_url: str, api_key: str | None = None, model: str = "", send_reasoning: bool = False,
                 max_retries: int = 2, timeout: float = 600):
        self.base_url, self.model, self.send_reasoning = base_url, model, send_reasoning
        try:
            (api_key or "").encode("ascii")  # it travels in a header
            self._client = openai.OpenAI(base_url=base_url, api_key=api_key or "none", max_retries=max_retries,
                                         timeout=timeout)
        except Exception as error:  # the SDK has no error of its own for a URL that is none
            raise UserError(f"{base_url}: {first_line(error)}") from None

    def complete(self, messages: list[dict], tools: list[dict] | None = None, **options) -> tuple[dict, str]:
        """The answer to `messages`, verbatim, as a message to append to them; and its finish_reason.

        `tools` default to those on the first message. `options` go to the request; those that are None do not.
        """
        body = to_body(messages, tools, options, self.send_reasoning)
        with self._errors():
            choice = self._create(body).choices[0]
            return from_openai(choice.message), choice.finish_reason

    def stream(self, messages: list[dict], tools: list[dict] | None = None, **options) -> Iterator[Event]:
        """The same answer as events while it is written. Special tokens in its text (`<think>`, …) are parsed."""
        options |= {"stream": True, "stream_options": {"include_usage": True}}
        body = to_body(messages, tools, options, self.send_reasoning)
        with self._errors(), self._create(body) as chunks:
            yield from events_of(chunks)

    def _create(self, body: dict):
        self.model = self.model or next((model.id for model in self._client.models.list()), "")
        if not self.model:
            raise UserError(f"{self.base_url} serves no model")
        return self._client.chat.completions.create(model=self.model, **body)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the SDK raises into one line."""
        try:
            yield
        except openai.APIConnectionError as error:
            raise UserError(f"no server at {self.base_url} ({first_line(error).rstrip('.')}); start one: "
                            "python scripts/serve_openai_api.py") from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RequestRefused(f"{self.base_url}: {first_line(error)}") from None
        except openai.OpenAIError as error:
            kind = UserError if 400 <= getattr(error, "status_code", 0) < 500 else Failure
            raise kind(f"{self.base_url}: {first_line(error)}") from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # what the SDK makes of other answers
            raise Failure(f"{self.base_url} does not answer as OpenAI's API does ({first_line(error)}); does the URL "
                          "end in /v1?") from None


def to_body(messages: list[dict], tools: list[dict] | None, options: dict, send_reasoning: bool) -> dict:
    """The body of a request, without the model. Raises ValueError for tools that cannot be read."""
    converted, first_tools = to_openai(messages, send_reasoning)
    tools = first_tools if tools is None else tools
    return {"messages": converted, **({"tools": tools} if tools else {}),
            **{key: value for key, value in options.items() if value is not None}}


def to_openai(messages: list[dict], send_reasoning: bool = False) -> tuple[list[dict], list[dict]]:
    """Our messages → OpenAI's messages and the tools: calls get ids, and each result names the call it answers.

    A first system message that only carries tools is left out. Raises ValueError for tools that cannot be read.
    """
    tools = parse_json(messages[0].get("tools") or [], "tools", list)
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    converted, open_calls = [], []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content") or ""
        if tools and number == 0 and role == "system" and not content:
            continue
        shape = {"role": role, "content": content}
        if send_reasoning and message.get("reasoning_content"):
            shape["reasoning_content"] = message["reasoning_content"]
        calls = parse_json(message.get("tool_calls") or [], "tool_calls", list)
        if calls:
            functions = [call.get("function", call) for call in calls]
            shape["tool_calls"] = [{"id": f"call_{number}_{i}", "type": "function", "function": {
                "name": function["name"], "arguments": arguments_text(function.get("arguments"))}}
                for i, function in enumerate(functions)]
            open_calls = [call["id"] for call in shape["tool_calls"]]
        elif role == "tool":
            shape["tool_call_id"] = open_calls.pop(0) if open_calls else f"call_{number}"
        converted.append(shape)
    return converted, tools


def arguments_text(arguments: dict | str | None) -> str:
    """The arguments of a call as JSON text; text as it is."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def tool_call(name: str, arguments: str | None) -> dict:
    """{"name", "arguments"} of a call: an object, or the text where that is none."""
    try:
        return {"name": name, "arguments": parse_json(arguments or {}, "arguments", dict)}
    except ValueError:
        return {"name": name, "arguments": arguments}


def as_strict(tools: list[dict]) -> list[dict]:
    """Tools that the server is to call with valid arguments only (OpenAI's `strict`)."""
    return [{"type": "function", "function": tool.get("function", tool) | {"strict": True}} for tool in tools]


def reasoning_of(message) -> str:
    """The thinking of an SDK message or delta, under the names that servers give it."""
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""


def from_openai(message) -> dict:
    """The SDK's message → an assistant message of ours."""
    answer = {"role": "assistant", "content": message.content or ""}
    if reasoning := reasoning_of(message):
        answer["reasoning_content"] = reasoning
    if message.tool_calls:
        answer["tool_calls"] = [tool_call(call.function.name, call.function.arguments) for call in message.tool_calls]
    return answer


def events_of(chunks: Iterator) -> Iterator[Event]:
    """The SDK's chunks → events. A call's arguments come in parts; a chunk is about a token until the usage says more.
    """
    parser, calls, finish_reason, num_tokens, num_chunks = MessageParser(None), {}, None, None, 0
    chunk = None
    for chunk in chunks:
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        for choice in chunk.choices[:1]:
            delta, finish_reason = choice.delta, choice.finish_reason or finish_reason
            reasoning = reasoning_of(delta)
            if reasoning or delta.content or delta.tool_calls:
                num_chunks += 1
                yield "tokens", 1
            if reasoning:
                yield "reasoning", reasoning
            yield from parser.feed_text(delta.content or "")
            for part in delta.tool_calls or ():
                call = calls.setdefault(part.index, {"name": "", "arguments": ""})
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
    if chunk is None:
        raise ValueError("an empty stream")
    yield from parser.finish()
    for call in calls.values():
        yield "tool_call", tool_call(**call)
    if num_tokens is not None:
        yield "tokens", num_tokens - num_chunks
    yield "end", finish_reason
