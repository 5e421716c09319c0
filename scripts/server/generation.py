"""A request on its way through the server: from a client's body to the engine's tokens, and back.

    ChatBody ─ from_chat_body ─→ GenerationRequest ─ EngineThread.submit ─→ Engine.add: one Sequence per choice
    JSON ←──── ChatChoice.add ── GenerationRequest.chunks ←─ TokenDelta ── Engine.step
"""

import asyncio
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from model.chat import BOS, ChatTokenizer, MessageParser, check_text
from model.inference.constraints import Grammar, chat_grammar, json_rule, regex_rule, text_grammar
from model.inference.engine import SamplingParams, Sequence
from scripts.server.choices import ChatChoice, TextChoice
from scripts.server.protocol import ApiError, ChatBody, CompletionBody, GenerationBody, TemplateOptions

MAX_TASK_CHARS = 20_000  # in which the example of a background task stands
MAX_CHOICES = 1024  # of one request: many small prompts cost more memory than their text


@dataclass(frozen=True)
class Defaults:
    """What a request leaves open; `model` is the name that clients give."""

    model: str = "minimind"
    max_new_tokens: int = 1024
    temperature: float = 0.85
    top_p: float = 0.95
    open_thinking: bool = False
    max_tools: int | None = None  # further ones are left out: a small model cannot handle many


@dataclass(eq=False)
class GenerationRequest:
    """One HTTP request, ready for the engine. `prompts`, `params`, `choices`, `sequences`: one entry per choice."""

    object: str  # what the response is: "chat.completion" or "text_completion"
    model: str
    prompts: list[list[int]]  # token ids; n choices of one prompt share the list
    params: list[SamplingParams]
    choices: list[ChatChoice | TextChoice]
    stream: bool
    include_usage: bool
    headers: dict[str, str] = field(default_factory=dict)  # of the response
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    sequences: list[Sequence] = field(default_factory=list)  # the engine's thread adds them
    deltas: asyncio.Queue = field(default_factory=asyncio.Queue)  # (index, TokenDelta), or why the engine failed
    submitted_at: float | None = None  # time.perf_counter(), until the first token comes
    end_of_stream = "data: [DONE]\n\n"

    @classmethod
    def from_chat_body(cls, body: ChatBody, tokenizer: ChatTokenizer, defaults: Defaults) -> "GenerationRequest":
        """Raises ApiError when the messages or tools cannot be written in the chat format."""
        template = body.chat_template_kwargs or TemplateOptions()
        effort = body.reasoning_effort and body.reasoning_effort not in ("none", "minimal")
        thinking = bool(first_given(body.open_thinking, template.open_thinking, template.enable_thinking, effort,
                                    defaults.open_thinking))
        tools = [tool.to_dict() for tool in body.tools or []] if body.tool_choice != "none" else []
        num_tools = len(tools)
        if defaults.max_tools is not None:
            tools = [tool for number, tool in enumerate(tools)
                     if number < defaults.max_tools or tool["function"]["name"] == body.named_tool]
        messages = [message.to_dict() for message in body.messages]
        continued = messages[-1]["content"] if body.continue_final_message else None
        try:
            prompt = tokenizer.prompt(messages, tools, thinking, continue_final_message=continued is not None)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None
        n = body.n or 1
        params = sampling_params(body, tokenizer, defaults, n, body.top_logprobs or None, body.max_completion_tokens,
                                 answer_grammar(body, tokenizer, thinking, tools))
        choices = [ChatChoice(i, tokenizer, MessageParser(tokenizer, thinking, continued), bool(tools),
                              bool(body.logprobs), is_legacy=bool(body.functions)) for i in range(n)]
        request = cls("chat.completion", defaults.model, [prompt] * n, params, choices, *stream_options(body))
        if num_tools > len(tools):
            request.headers["X-Tools-Left-Out"] = f"{num_tools - len(tools)} of {num_tools}, by --max_tools"
        return request

    @classmethod
    def from_completion_body(cls, body: CompletionBody, tokenizer: ChatTokenizer,
                             defaults: Defaults) -> "GenerationRequest":
        """Text follows `<|im_start|>`, as in pretraining; token ids are taken as they are. Raises ApiError."""
        prompts = body.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        try:
            check_text("".join(prompt for prompt in prompts if isinstance(prompt, str)))
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from None
        prompts = [prompt if isinstance(prompt, list) else [BOS, *tokenizer.encode_text(prompt)] for prompt in prompts]
        if not prompts or not all(prompts):
            raise ApiError(400, "prompt: must not be empty", "prompt")
        if any(not 0 <= i < tokenizer.vocab_size for prompt in prompts for i in prompt):
            raise ApiError(400, f"prompt: token ids are 0 to {tokenizer.vocab_size - 1}", "prompt")
        n = body.n or 1
        num_choices = n * len(prompts)
        if num_choices > MAX_CHOICES:
            raise ApiError(400, f"prompt: {num_choices:,} choices requested, the limit is {MAX_CHOICES:,}", "prompt")
        params = sampling_params(body, tokenizer, defaults, num_choices, body.logprobs or None,
                                 grammar=completion_grammar(body, tokenizer))
        choices = [TextChoice(i, tokenizer, body.logprobs is not None) for i in range(num_choices)]
        return cls("text_completion", defaults.model, [prompt for prompt in prompts for _ in range(n)], params, choices,
                   *stream_options(body))

    async def events(self) -> AsyncIterator[dict]:
        """The events of the response's stream. Raises what the engine raised."""
        for choice in self.choices:
            if first_chunk := choice.first_chunk():
                yield self.to_chunk([first_chunk])
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                yield self.to_chunk([chunk])
        if self.include_usage:
            yield self.to_chunk([], self.usage())

    def error_event(self, error: ApiError) -> dict:
        """The last event of a stream that fails after its status was sent."""
        return error.body()

    async def chunks(self) -> AsyncIterator[dict]:
        """The choices' chunks as the engine samples them, until all have finished. Raises what the engine raised."""
        num_open = len(self.choices)
        while num_open:
            delta = await self.deltas.get()
            if isinstance(delta, Exception):
                raise delta
            index, delta = delta
            for chunk in self.choices[index].add(delta):
                yield chunk
            num_open -= delta.finish_reason is not None

    @property
    def num_prompt_tokens(self) -> int:
        """A prompt of n choices counts once."""
        return sum({id(prompt): len(prompt) for prompt in self.prompts}.values())

    def usage(self) -> dict:
        """The tokens of the finished request; those of a prompt are cached where none of its choices computed them."""
        completion_tokens = sum(len(sequence.completion_ids) for sequence in self.sequences)
        num_cached: dict[int, int] = {}
        for prompt, sequence in zip(self.prompts, self.sequences, strict=True):
            num_cached[id(prompt)] = min(sequence.num_cached_tokens, num_cached.get(id(prompt), len(prompt)))
        return {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": completion_tokens,
                "total_tokens": self.num_prompt_tokens + completion_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(num_cached.values())},
                "completion_tokens_details": {
                    "reasoning_tokens": sum(choice.num_reasoning_tokens for choice in self.choices)}}

    def to_response(self) -> dict:
        """The finished response, in one piece."""
        return self._envelope([choice.to_response() for choice in self.choices]) | {"usage": self.usage()}

    def to_chunk(self, choices: list[dict], usage: dict | None = None) -> dict:
        """One event of the response's stream."""
        is_chat = self.object == "chat.completion"
        return self._envelope(choices, ".chunk" * is_chat) | ({"usage": usage} if self.include_usage else {})

    def _envelope(self, choices: list[dict], suffix: str = "") -> dict:
        prefix = "chatcmpl-" if self.object == "chat.completion" else "cmpl-"
        return {"id": prefix + self.id, "object": self.object + suffix, "created": self.created, "model": self.model,
                "choices": choices}


def first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def task_schema(body: ChatBody) -> dict | None:
    """What a background task of Open WebUI (title, tags, follow-ups) is to answer: the shape of its example, briefly.

    Such a request is one user message, "### Task:" to "<chat_history>", with JSON as an example after "### Output:".
    """
    text = body.messages[0].content if len(body.messages) == 1 else None
    pattern = r"### Task:\n.*?### Output:[^{}]*(\{[^{}]*\}).*<chat_history>"
    match = isinstance(text, str) and re.match(pattern, text[:MAX_TASK_CHARS], re.S)
    try:
        example = json.loads(match[1]) if match else {}
    except ValueError:
        return None
    item = {"type": "string", "maxLength": 60}
    properties = {key: {"type": "array", "items": item, "maxItems": 3} if isinstance(value, list) else item
                  for key, value in example.items()}
    return properties and {"type": "object", "properties": properties, "required": list(properties),
                           "additionalProperties": False}


def stream_options(body: GenerationBody) -> tuple[bool, bool]:
    """`stream` and `include_usage`."""
    return bool(body.stream), bool(body.stream_options and body.stream_options.include_usage)


def answer_grammar(body: ChatBody, tokenizer: ChatTokenizer, thinking: bool, tools: list[dict]) -> Grammar | None:
    """What the answer must look like by `response_format`, `tool_choice`, `parallel_tool_calls`, `strict` tools and
    vLLM's `guided_…`. None: anything. Raises ApiError for a schema that is wrong or too much for the sampler."""
    param, rule = answer_rule(body)
    if body.named_tool:
        tools = [tool for tool in tools if tool["function"]["name"] == body.named_tool]
    if body.call_required and not tools:
        raise ApiError(400, f"tool_choice: there is no tool {body.named_tool or 'to call'}", "tool_choice")
    one_call = body.named_tool is not None or body.parallel_tool_calls is False
    is_strict = any((tool.function.model_extra or {}).get("strict") for tool in body.tools or ())
    if rule is None and not (tools and (body.call_required or one_call or is_strict)):
        return None
    if body.continue_final_message:
        raise ApiError(400, f"continue_final_message cannot be combined with a constrained answer ({param})", param)
    with reported_under(param):
        return chat_grammar(tokenizer, thinking, rule, tools, body.call_required, not one_call)


def completion_grammar(body: CompletionBody, tokenizer: ChatTokenizer) -> Grammar | None:
    """As `answer_grammar`, of a plain completion."""
    param, rule = answer_rule(body)
    with reported_under(param):
        return None if rule is None else text_grammar(tokenizer, rule)


def answer_rule(body: GenerationBody) -> tuple[str, str | None]:
    """The field that says what the answer looks like, and the rule of a grammar that says the same."""
    response_format = getattr(body, "response_format", None)
    schemas = {"response_format": response_format and response_format.schema_value, "guided_json": body.guided_json}
    rules = {name: (json_rule, schema) for name, schema in schemas.items() if schema is not None}
    if body.guided_regex is not None:
        rules["guided_regex"] = regex_rule, body.guided_regex
    if not rules and isinstance(body, ChatBody) and (schema := task_schema(body)):
        rules["messages"] = json_rule, schema
    if len(rules) > 1:
        raise ApiError(400, f"send one of {' and '.join(rules)}", min(rules))
    for name, (rule, value) in rules.items():
        with reported_under(name):
            return name, rule(value)
    return "tools", None


@contextmanager
def reported_under(param: str) -> Iterator[None]:
    """What is wrong with a schema is the fault of the field it came in."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param) from None


def sampling_params(body: GenerationBody, tokenizer: ChatTokenizer, defaults: Defaults, num_choices: int,
                    top_logprobs: int | None, max_completion_tokens: int | None = None,
                    grammar: Grammar | None = None) -> list[SamplingParams]:
    """The params of each choice; choice i is sampled with the seed + i. Raises ApiError."""
    seed = first_given(body.seed, secrets.randbits(62))
    stop = body.stop or ()
    logit_bias = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
    if any(token >= tokenizer.vocab_size for token, _ in logit_bias):
        raise ApiError(400, f"logit_bias: token ids are 0 to {tokenizer.vocab_size - 1}", "logit_bias")
    params = {
        "max_new_tokens": first_given(max_completion_tokens, body.max_tokens, defaults.max_new_tokens),
        "temperature": first_given(body.temperature, defaults.temperature),
        "top_p": first_given(body.top_p, defaults.top_p), "top_k": max(body.top_k or 0, 0), "min_p": body.min_p or 0.0,
        "presence_penalty": body.presence_penalty or 0.0, "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": first_given(body.repetition_penalty, 1.0),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop), "top_logprobs": top_logprobs,
        "logit_bias": logit_bias, "grammar": grammar,
    }
    return [SamplingParams(**params, seed=(seed + i) % 2**63) for i in range(num_choices)]
