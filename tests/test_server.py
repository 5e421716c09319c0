"""The server over real HTTP: uvicorn on a loopback port, OpenAI's own client, schemathesis, prometheus' own parser."""

import asyncio
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import httpx
import hypothesis
import openai
import psutil
import pytest
import schemathesis
import torch
import uvicorn
from openai.types.responses import Response, ResponseStreamEvent
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from torch.nn.functional import cross_entropy

from model.chat import BOS, EOS, SPECIAL_TOKENS, ChatTokenizer, MessageParser, parse_message
from model.cli import run_main
from model.inference.engine import Engine, SamplingParams, Sequence, TokenDelta, generate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import ROOT, save_weight
from scripts import chat_api
from scripts.serve_openai_api import Server, create_app, listen
from scripts.server.choices import ChatChoice, TextChoice
from scripts.server.engine_thread import EngineThread
from scripts.server.generation import Defaults, GenerationRequest
from scripts.server.middleware import MAX_BODY
from scripts.server.protocol import ApiError
from scripts.server.responses import RecentItems
from trainer.rl.tools import SCHEMAS

TOKENIZER = ChatTokenizer()
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
TOOLS = [SCHEMAS["text_length"], SCHEMAS["random_number"]]
WHO = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A very small model, 你好! Bye."}]
SUM = [{"role": "user", "content": "2 + 2?"},
       {"role": "assistant", "reasoning_content": "Two and two.", "content": "Four."}]
CALL = {"name": "text_length", "arguments": {"text": "巴黎"}}
TASK = [{"role": "user", "content": "How long?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"length": 2}'}, {"role": "assistant", "content": "Two characters."}]
LONG = {"messages": [{"role": "user", "content": "on and on"}], "temperature": 0, "max_tokens": 30_000}


@dataclass
class Served:
    """A running server and what a test may want to look into."""

    url: str
    server: Server
    service: EngineThread
    thread: threading.Thread

    def client(self, kind=openai.OpenAI, **options):
        return kind(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120, **options})

    def post(self, path: str = "/v1/chat/completions", **options) -> httpx.Response:
        return httpx.post(self.url + path, timeout=120, **options)

    def chat(self, messages: list, **options):
        return self.client().chat.completions.create(model="minimind", messages=messages, temperature=0, **options)

    def settles(self, condition: Callable[[], bool] | None = None) -> bool:
        """Whether the condition (by default: nothing runs or waits) holds before long."""
        condition = condition or (lambda: not (self.service.num_pending or self.service.engine.busy))
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        return condition()


@contextmanager
def serving(model, max_batch: int = 16, max_queue: int = 128, api_key: str | None = None,
            cors: list[str] | None = None, max_tools: int | None = None) -> Iterator[Served]:
    service = EngineThread(partial(Engine, model, TOKENIZER, max_batch, 32_768), max_queue)
    app = create_app(service, TOKENIZER, Defaults(max_new_tokens=40, max_tools=max_tools), api_key, cors)
    with listen("127.0.0.1", 0) as listener:
        server = Server(uvicorn.Config(app, log_level="warning", access_log=False), service)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Served(url, server, service, thread)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    """A model that knows three conversations by heart."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**SMALL))
    rows = [TOKENIZER.encode(WHO), TOKENIZER.encode(SUM), TOKENIZER.encode(TASK, TOOLS)]
    ids, said = torch.zeros(2, 3, max(len(row) for row, _ in rows), dtype=torch.long)
    for number, (row, mask) in enumerate(rows):
        ids[number, :len(row)], said[number, :len(row)] = torch.tensor(row), torch.tensor(mask)
    places, = said.flatten().nonzero(as_tuple=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    wanted = ids.flatten()[places]
    for _ in range(200):
        logits = model(ids, logits_indices=places - 1).logits
        loss = cross_entropy(logits, wanted)
        if loss < 0.05 and (logits.argmax(-1) == wanted).all():
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        pytest.fail(f"not learned: {loss}")
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def wild() -> MiniMindForCausalLM:
    """A random model, which does not stop by itself."""
    torch.manual_seed(1)
    model = MiniMindForCausalLM(MiniMindConfig(**SMALL)).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    model.model.embed_tokens.weight[:36] = 0  # the tied head never likes a special token best
    return model


@pytest.fixture(scope="module")
def served(model) -> Iterator[Served]:
    with serving(model) as served:
        yield served


@pytest.fixture(scope="module")
def wildly(wild) -> Iterator[Served]:
    with serving(wild) as served:
        yield served


# -- chat --------------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_models_own(served):
    answer = served.chat(WHO[:1])
    choice, = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", WHO[1]["content"])
    assert (choice.finish_reason, answer.object, answer.model) == ("stop", "chat.completion", "minimind")
    prompt, whole = TOKENIZER.prompt(WHO[:1]), TOKENIZER.encode(WHO)[0]
    sampled = len(whole) - len(prompt) - 1  # all but the newline after the end token
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), sampled)
    assert answer.usage.total_tokens == len(prompt) + sampled


def test_a_stream_adds_up_to_the_answer(served):
    chunks = list(served.chat(WHO[:1], stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *talk, usage = chunks
    assert talk[0].choices[0].delta.role == "assistant" and talk[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in talk) == WHO[1]["content"]
    assert [chunk.choices[0].finish_reason for chunk in talk] == [None] * (len(talk) - 1) + ["stop"]
    assert len(talk) > 8 and all(chunk.usage is None for chunk in talk)
    assert usage.choices == [] and usage.usage.completion_tokens == served.chat(WHO[:1]).usage.completion_tokens


def test_the_wire_is_server_sent_events(served):
    body = {"messages": WHO[:1], "stream": True, "temperature": 0, "max_tokens": 3}
    response = served.post(json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = response.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)
    assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("wish", [{"open_thinking": 1}, {"chat_template_kwargs": {"open_thinking": True}},
                                  {"chat_template_kwargs": {"enable_thinking": True}}])
def test_thinking_is_apart_from_the_content(served, wish):
    message = served.chat(SUM[:1], extra_body=wish).choices[0].message
    assert (message.reasoning_content, message.content) == ("Two and two.", "Four.")
    deltas = [chunk.choices[0].delta for chunk in served.chat(SUM[:1], extra_body=wish, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Two and two."
    assert "".join(delta.content or "" for delta in deltas) == "Four."


def test_thinking_is_closed_unless_asked_for(served):
    closed = served.chat(SUM[:1], extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert closed.usage.prompt_tokens == len(TOKENIZER.prompt(SUM[:1])) == served.chat(SUM[:1]).usage.prompt_tokens


def test_a_tool_is_called_and_its_result_is_read(served):
    message = (answer := served.chat(TASK[:1], tools=TOOLS).choices[0]).message
    call, = message.tool_calls
    assert answer.finish_reason == "tool_calls" and message.content is None
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", *CALL.values())
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": TASK[2]["content"]}]}
    again = served.chat([*TASK[:1], message.model_dump(exclude_none=True), result], tools=TOOLS)
    assert again.choices[0].message.content == "Two characters." and again.choices[0].finish_reason == "stop"
    assert again.usage.prompt_tokens == len(TOKENIZER.prompt(TASK[:3], TOOLS))
    assert again.usage.prompt_tokens_details.cached_tokens > 40  # the first turn is not computed again


def test_a_tool_call_streams_in_pieces(served):
    with served.client().chat.completions.stream(model="minimind", messages=TASK[:1], tools=TOOLS,
                                                 temperature=0) as stream:
        pieces = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        choice = stream.get_final_completion().choices[0]
    call, = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == tuple(CALL.values())
    assert "".join(pieces) == call.function.arguments and choice.finish_reason == "tool_calls" and call.id


def test_tool_choice_none_hides_the_tools(served):
    hidden = served.chat(TASK[:1], tools=TOOLS, tool_choice="none")
    assert hidden.usage.prompt_tokens == len(TOKENIZER.prompt(TASK[:1]))
    assert hidden.choices[0].message.tool_calls is None


def test_a_client_of_functions_calls_one(served):
    choice = served.chat(TASK[:1], functions=[tool["function"] for tool in TOOLS]).choices[0]
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    assert (choice.message.function_call.name, json.loads(choice.message.function_call.arguments)) == tuple(
        CALL.values())
    history = [*TASK[:1], choice.message.model_dump(exclude_none=True),
               {"role": "function", "name": CALL["name"], "content": TASK[2]["content"]}]
    again = served.chat(history, functions=[tool["function"] for tool in TOOLS])
    assert again.choices[0].message.content == TASK[3]["content"]


def choice_of(text: str, finish_reason: str = "stop", has_tools: bool = True) -> tuple[list[dict], dict]:
    """What an answer becomes that is sampled token by token: its chunks, and the whole."""
    choice = ChatChoice(0, TOKENIZER, MessageParser(TOKENIZER), has_tools=has_tools, has_logprobs=False)
    ids = []
    for part in re.split("(</?tool_call>)", text):  # markers become tokens
        ids += [SPECIAL_TOKENS[part]] if part in SPECIAL_TOKENS else TOKENIZER.encode_text(part)
    chunks = []
    for i in ids[:-1]:
        chunks += choice.add(TokenDelta([i], [(i, -0.5, [])], 1, None))
    chunks += choice.add(TokenDelta(ids[-1:], [(ids[-1], -0.5, [])], 1, finish_reason))
    return chunks, choice.to_response()


def test_a_call_that_cannot_be_read_is_shown_as_text():
    chunks, whole = choice_of('Well.\n<tool_call>\n{"name": 3}\n</tool_call>')
    assert whole["message"]["content"] == 'Well.\n<tool_call>\n{"name": 3}\n</tool_call>'
    assert whole["finish_reason"] == "stop" and "tool_calls" not in whole["message"]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]


def test_a_call_cut_by_the_length_is_text_and_not_a_call():
    _, whole = choice_of('<tool_call>\n{"name": "a", "argu', finish_reason="length")
    assert whole["finish_reason"] == "length" and whole["message"]["content"].startswith('<tool_call>\n{"name": "a"')


def test_a_call_that_was_not_allowed_is_text():
    _, whole = choice_of('<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>', has_tools=False)
    assert "tool_calls" not in whole["message"] and '"name": "a"' in whole["message"]["content"]


def test_two_calls_have_an_index_and_an_id_each():
    text = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "b"}\n</tool_call>'
    chunks, whole = choice_of(text)
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 0, 1, 1]
    assert len({call["id"] for call in whole["message"]["tool_calls"]}) == 2
    assert [call["function"]["name"] for call in whole["message"]["tool_calls"]] == ["a", "b"]


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_choices_differ_and_seeds_repeat(wildly):
    client = wildly.client()

    def texts(**options) -> list[str]:
        answer = client.chat.completions.create(model="minimind", messages=WHO[:1], max_tokens=12, temperature=1,
                                                top_p=1, **options)
        assert [choice.index for choice in answer.choices] == list(range(options.get("n", 1)))
        assert answer.usage.prompt_tokens == len(TOKENIZER.prompt(WHO[:1]))
        assert answer.usage.completion_tokens == 12 * options.get("n", 1)
        return [choice.message.content for choice in answer.choices]

    three = texts(n=3, seed=5)
    assert len(set(three)) == 3 and texts(n=3, seed=5) == three
    assert texts(seed=6) == three[1:2] and texts() != texts()


def test_choices_stream_side_by_side(wildly):
    chunks = list(wildly.chat(WHO[:1], n=2, max_tokens=5, stream=True))
    for index in range(2):
        of_one = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert of_one[0].delta.role == "assistant" and of_one[-1].finish_reason == "length"


def test_an_answer_that_was_begun_is_continued(served):
    begun = [*WHO[:1], WHO[1] | {"content": WHO[1]["content"][:12]}]
    switches = {"continue_final_message": True, "add_generation_prompt": False}
    assert served.chat(begun, extra_body=switches).choices[0].message.content == WHO[1]["content"][12:]


def test_a_logit_bias_bans_and_forces(served):
    token, = TOKENIZER.encode_text("A")
    banned = served.chat(WHO[:1], logit_bias={str(token): -100}, max_tokens=1).choices[0].message.content
    forced = served.chat(WHO[:1], logit_bias={str(token): 100}, max_tokens=3).choices[0].message.content
    assert banned != "A" and forced == "AAA"


def test_every_parameter_reaches_the_engine(wildly, monkeypatch):
    seen = []
    add = wildly.service.engine.add
    monkeypatch.setattr(wildly.service.engine, "add", lambda prompt, sampling: seen.append(sampling) or add(
        prompt, sampling))
    options = {"temperature": 0.5, "top_p": 0.6, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 7,
               "stop": ["a b", "c"]}
    own = {"top_k": 4, "min_p": 0.01, "repetition_penalty": 1.2, "logit_bias": {"40": 1}}
    wildly.client().chat.completions.create(model="minimind", messages=WHO[:1], max_completion_tokens=3, max_tokens=2,
                                            logprobs=True, top_logprobs=2, extra_body=own, **options)
    wildly.post("/v1/completions", json={"prompt": "a", "top_k": -1, "max_tokens": 2, "stop": None, "seed": 1})
    wildly.post(json={"messages": WHO[:1], "seed": -1})
    assert seen[0] == SamplingParams(3, top_logprobs=2, **options | own | {"stop": ("a b", "c"),
                                                                           "logit_bias": ((40, 1),)})
    assert seen[1] == SamplingParams(2, seed=1)  # the defaults of eval_llm.py
    assert seen[2].max_new_tokens == 40 and seen[2].seed >= 0


def test_a_stop_string_is_never_shown_in_part(served):
    answer = served.chat(WHO[:1], stop=["好! B", "zzz"]).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("A very small model, 你", "stop")
    chunks = served.chat(WHO[:1], stop="好! B", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "A very small model, 你"


def test_logprobs_are_the_engines(served, model):
    answer = served.chat(WHO[:1], logprobs=True, top_logprobs=3).choices[0]
    expected, = generate(model, [TOKENIZER.prompt(WHO[:1])], SamplingParams(40, temperature=0, top_logprobs=3))
    tokens = answer.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer.message.content
    assert [token.logprob for token in tokens] == pytest.approx(expected.logprobs[:len(tokens)], abs=1e-4)
    for token, top in zip(tokens, expected.top_logprobs, strict=False):
        assert [bytes(likely.bytes) for likely in token.top_logprobs] == [TOKENIZER.token_bytes[i] for i, _ in top]
    streamed = [token for chunk in served.chat(WHO[:1], logprobs=True, stream=True)
                for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert served.chat(WHO[:1]).choices[0].logprobs is None


# -- plain completions -------------------------------------------------------------------------------------------------


def test_a_text_is_continued(wildly, wild):
    ids = [BOS, *TOKENIZER.encode_text("Once upon")]
    expected, = generate(wild, [ids], SamplingParams(8, temperature=0), TOKENIZER)
    complete = partial(wildly.client().completions.create, model="minimind", temperature=0, max_tokens=8)
    answer = complete(prompt="Once upon")
    assert (answer.object, answer.choices[0].text) == ("text_completion", expected.text)
    assert complete(prompt=ids).choices[0].text == expected.text
    assert "".join(chunk.choices[0].text for chunk in complete(prompt="Once upon", stream=True)) == expected.text
    both = complete(prompt=["Once upon", "a"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[1].text == expected.text and both.choices[2].text == complete(prompt="a").choices[0].text
    assert both.usage.prompt_tokens == len(ids) + 1 + len(TOKENIZER.encode_text("a"))


def test_a_continuation_has_logprobs(wildly):
    answer = wildly.client().completions.create(model="minimind", prompt="x", temperature=0, max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 4
    assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


@pytest.mark.parametrize("path, body", [
    ("/v1/chat/completions", {"messages": WHO[:1], "logprobs": True, "top_logprobs": 20}),
    ("/v1/completions", {"prompt": "x", "logprobs": 20})])
def test_what_cannot_be_drawn_has_a_finite_logprob(wildly, path, body):
    response = wildly.post(path, json=body | {"temperature": 1, "top_p": 0.001, "max_tokens": 2})
    assert response.status_code == 200 and "Infinity" not in response.text


# -- responses ---------------------------------------------------------------------------------------------------------

ITEM_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]


def respond(served, conversation, **options):
    return served.client().responses.create(model="minimind", input=conversation, temperature=0, **options)


def test_a_response_has_the_logprobs_of_every_token(wildly):
    options = {"top_logprobs": 1, "extra_body": {"logit_bias": {str(i): 20 for i in TOKENIZER.encode_text("龘")}}}
    chat = wildly.chat(USER, max_tokens=12, logprobs=True, **options).choices[0]
    message = respond(wildly, USER, max_output_tokens=12, **options).output[-1].content[0]
    assert [token.bytes for token in message.logprobs] == [token.bytes for token in chat.logprobs.content]
    assert len(message.logprobs) == 12 > len(message.text)  # some are bytes of a character


def test_the_bytes_of_a_character_are_named_and_do_not_move_the_text():
    choice, first = TextChoice(0, TOKENIZER, has_logprobs=True), TOKENIZER.encode_text("龘")
    ids = [*first, *TOKENIZER.encode_text("好"), EOS]
    top = [(first[0], -0.5), (first[1], -1.5)]
    list(choice.add(TokenDelta(["龘好"], [(i, -0.5, top) for i in ids], len(ids), "length")))
    logprobs = choice.to_response()["logprobs"]
    assert logprobs["tokens"][0].startswith("bytes:\\x") and logprobs["text_offset"] == [*[0] * len(first), 1, 2]
    assert list(logprobs["top_logprobs"][0].values()) == [-0.5, -1.5]


def test_a_response_is_the_answer_of_the_chat(served):
    response, chat = respond(served, WHO[0]["content"]), served.chat(WHO[:1])
    assert response.output_text == WHO[1]["content"] and response.status == "completed"
    Response.model_validate(response.model_dump())
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens)
    cut = respond(served, WHO[:1], max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in cut.output] == ["incomplete"]
    tokens = respond(served, WHO[:1], top_logprobs=2).output[0].content[0].logprobs
    assert "".join(token.token for token in tokens[:5]) == WHO[1]["content"][:len("".join(
        token.token for token in tokens[:5]))] and len(tokens[0].top_logprobs) == 2


def test_a_response_streams_as_the_sdk_reads_it(served):
    body = {"model": "minimind", "input": SUM[0]["content"], "temperature": 0, "reasoning": {"effort": "low"}}
    *wire, nothing = served.post("/v1/responses", json=body | {"stream": True}).text.split("\n\n")
    events = [TypeAdapter(ResponseStreamEvent).validate_json(event.split("\ndata: ")[1]) for event in wire]
    assert not nothing and [event.split("\n")[0] for event in wire] == [f"event: {event.type}" for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    with served.client().responses.stream(**body) as stream:
        assert [event.type for event in stream] == [event.type for event in events]
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "Two and two."
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Four."
    reasoning, message = final.output
    assert (reasoning.content[0].text, message.content[0].text) == ("Two and two.", "Four.")
    assert final.usage.output_tokens_details.reasoning_tokens == len(TOKENIZER.encode_text("Two and two.\n")) + 1
    again = respond(served, SUM[:1], reasoning={"effort": "low"})
    assert [item.type for item in again.output] == ["reasoning", "message"] and again.output_text == "Four."


def test_a_response_calls_a_tool_and_reads_its_result(served):
    with served.client().responses.stream(model="minimind", input=TASK[:1], tools=ITEM_TOOLS, temperature=0) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        response = stream.get_final_response()
    call, = response.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", *CALL.values())
    assert "".join(pieces) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": TASK[2]["content"]}
    again = respond(served, [*TASK[:1], call.model_dump(), result], tools=ITEM_TOOLS)
    assert again.output_text == "Two characters."
    assert again.usage.input_tokens == len(TOKENIZER.prompt(TASK[:3], TOOLS))


@pytest.mark.parametrize("chat_shaped", [False, True])
def test_a_response_repeats_the_request_as_openai_writes_it(served, chat_shaped):
    tool = ITEM_TOOLS[0]
    named = {"name": tool["name"]}
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    text = {"format": {"type": "json_schema", "name": "nothing", "schema": schema, "strict": True}}
    body = {"input": "hi", "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 40, "instructions": "Be brief.",
            "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": False, "top_logprobs": 2, "text": text,
            "tools": [tool], "reasoning": {"effort": "none"},
            "tool_choice": {"type": "function"} | ({"function": named} if chat_shaped else named)}
    answer = served.post("/v1/responses", json=body).json()
    Response.model_validate(answer, strict=True)
    assert answer["tool_choice"] == {"type": "function", **named} and answer["reasoning"]["effort"] == "none"
    assert answer["tools"][0].items() >= tool.items()
    repeated = body.keys() - {"input", "tool_choice", "tools", "text", "reasoning"}
    assert {name: answer[name] for name in repeated} == {name: body[name] for name in repeated}
    assert answer["text"]["format"].items() >= text["format"].items()
    plain = served.post("/v1/responses", json={"input": "hi", "max_output_tokens": 2}).json()
    Response.model_validate(plain, strict=True)
    assert (plain["tool_choice"], plain["parallel_tool_calls"], plain["store"], plain["metadata"], plain["tools"]) == (
        "auto", True, True, {}, [])
    assert plain["text"] == {"format": {"type": "text"}} and plain["previous_response_id"] is None


@pytest.mark.parametrize(("body", "error"), [
    ({"tools": ITEM_TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice"),
    ({"previous_response_id": "resp_1"}, "previous_response_id: nothing is stored here"),
    ({"input": [{"type": "item_reference", "id": "1"}]}, "item 1 is not in memory"),
    ({"input": [{"type": "computer_call"}]}, "input.0: .*not computer_call"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0: .*text only"),
    ({"tools": [{"type": "web_search"}]}, "tools.0: .*has the type web_search"), ({"temperature": 3}, "temperature"),
    ({"input": []}, "input"), ({"max_output_tokens": 0}, "max_output_tokens")])
def test_a_response_that_cannot_be_had_is_refused(served, body, error):
    with pytest.raises(openai.BadRequestError, match=error):
        served.client().responses.create(**{"model": "minimind", "input": "hi", "store": True} | body)


def test_items_are_kept_for_references_while_there_is_memory():
    items = RecentItems(max_size=100)
    for name in "abc":
        items.add({"id": name, "text": "x" * 20})
    assert items.get("c")["id"] == "c" and items.get("b")
    with pytest.raises(ApiError, match="item a is not in memory"):
        items.get("a")


# -- many at once ------------------------------------------------------------------------------------------------------


def test_64_streams_at_once_are_what_they_are_alone(wildly, wild):
    prompts = [[{"role": "user", "content": f"number {i} " * (1 + i % 5)}] for i in range(64)]
    greedy = SamplingParams(12, temperature=0)
    alone = [generate(wild, [TOKENIZER.prompt(prompt)], greedy, TOKENIZER)[0] for prompt in prompts]

    async def ask(client: openai.AsyncOpenAI, messages: list) -> str:
        stream = await client.chat.completions.create(model="minimind", messages=messages, temperature=0,
                                                      max_tokens=12, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with wildly.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    expected = [parse_message(TOKENIZER, sequence.output_pieces) for sequence in alone]
    assert asyncio.run(ask_all()) == [answer.content for answer in expected]
    assert wildly.settles()


def test_a_client_that_leaves_frees_its_place(wildly):
    async def leave() -> None:
        async with wildly.client(openai.AsyncOpenAI) as client:
            stream = await client.chat.completions.create(model="minimind", stream=True, **LONG)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            whole = asyncio.create_task(client.chat.completions.create(model="minimind", **LONG))
            await asyncio.to_thread(wildly.settles, lambda: wildly.service.engine.num_running == 1)
            whole.cancel()

    asyncio.run(leave())
    assert wildly.settles() and not wildly.service._owners


def test_a_soak_with_disconnects_loses_no_place_and_no_memory(wildly):
    """SOAK=1000 makes it long."""
    dice, count = random.Random(0), int(os.environ.get("SOAK", 100))
    memory = []

    async def ask(client: httpx.AsyncClient, body: dict) -> None:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for _ in response.aiter_lines():
                pass

    async def soak() -> None:
        async with httpx.AsyncClient(base_url=wildly.url, timeout=120) as client:
            for start in range(0, count, 25):
                requests = []
                for _ in range(min(25, count - start)):
                    body = {"messages": [{"role": "user", "content": "x " * dice.randrange(1, 200)}],
                            "n": dice.choice((1, 1, 2)), "stream": dice.random() < 0.7,
                            "max_tokens": dice.choice((3, 20, 3000))}
                    requests.append(asyncio.wait_for(ask(client, body), 0.2 + 2 * dice.random()))
                for end in await asyncio.gather(*requests, return_exceptions=True):
                    assert end is None or isinstance(end, (TimeoutError, asyncio.TimeoutError)), end
                memory.append(psutil.Process().memory_info().rss)

    asyncio.run(soak())
    assert wildly.settles() and not wildly.service._owners
    gc.collect()
    kept = Counter(type(thing) for thing in gc.get_objects())
    assert kept[GenerationRequest] < 5  # the engine's thread still holds its last command
    assert kept[Sequence] <= wildly.service.engine.max_batch + 64  # what is kept for reuse; 64 of the test before
    assert memory[-1] - memory[0] < 100 * 2**20, memory
    assert wildly.chat(WHO[:1], max_tokens=2).choices[0].finish_reason == "length"


# -- errors ------------------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "hello"}]
BAD = {
    "not JSON": ("{", "JSON"), "no object": ("[]", ""), "empty": ("", ""),
    "no messages": ({}, "messages"), "empty messages": ({"messages": []}, "messages"),
    "messages of another type": ({"messages": "hello"}, "messages"),
    "bad role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "content of another type": ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text only"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    "half a type": ('{"messages": [{"role": "user", "content": [{"type": "\\ud800"}]}]}', "surrogate"),
    "a bad call": ({"messages": [*USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "message 2"),
    "negative length": ({"messages": USER, "max_tokens": -2}, "max_tokens"),
    "no length": ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
    "hot": ({"messages": USER, "temperature": 2.5}, "temperature"),
    "cold": ({"messages": USER, "temperature": -0.1}, "temperature"),
    "temperature as text": ({"messages": USER, "temperature": "0.5"}, "temperature"),
    "not a number": ('{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
    "too large a number": ('{"messages": [{"role": "user", "content": "x"}], "seed": 1' + "0" * 5000 + "}", ""),
    "top_p": ({"messages": USER, "top_p": 1.1}, "top_p"), "n": ({"messages": USER, "n": 0}, "n"),
    "stream": ({"messages": USER, "stream": "yes"}, "stream"),
    "stop of numbers": ({"messages": USER, "stop": 3}, "stop"),
    "tools": ({"messages": USER, "tools": [{"type": "function"}]}, "tools.0.function"),
    "tool_choice": ({"messages": USER, "tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    "top_logprobs": ({"messages": USER, "top_logprobs": 3}, "top_logprobs"),
    "response_format": ({"messages": USER, "response_format": {"type": "xml"}}, "response_format"),
    "logit_bias": ({"messages": USER, "logit_bias": {"6400": 1}}, "logit_bias"),
    "too long": ({"messages": [{"role": "user", "content": "1" * 40_000}]}, "40,0"),
    "depth": ('{"messages": ' + "[" * 100_000, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_in_openais_error_object(served, case):
    body, said = BAD[case]
    content = body if isinstance(body, str) else json.dumps(body)
    response = served.post(content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error", response.text
    assert said in error["message"] and "\n" not in error["message"] and set(error) == {
        "message", "type", "param", "code"}
    if case == "too long":
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]},
                                  {"prompt": [6400]}, {"prompt": {"a": 1}}, {"prompt": ["x"] * 1025},
                                  {"prompt": "x", "echo": True}, {"prompt": "x", "suffix": "y"},
                                  {"prompt": "x", "logprobs": True}])
def test_a_bad_continuation_is_told_too(served, body):
    response = served.post("/v1/completions", json=body)
    if body.get("prompt") == "":  # the beginning of any text
        assert response.status_code == 200
    else:
        assert response.status_code == 400 and response.json()["error"]["message"]


def test_bad_requests_do_not_harm_a_good_one(wildly, wild):
    expected, = generate(wild, [TOKENIZER.prompt(LONG["messages"])], SamplingParams(60, temperature=0), TOKENIZER)
    stream = wildly.client().chat.completions.create(model="minimind", stream=True, **LONG | {"max_tokens": 60})
    pieces = []
    for chunk, (body, _) in zip(stream, [*BAD.values()] * 3, strict=False):
        pieces.append(chunk.choices[0].delta.content or "")
        content = body if isinstance(body, str) else json.dumps(body)
        assert wildly.post(content=content, headers={"Content-Type": "application/json"}).status_code == 400
    pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == parse_message(TOKENIZER, expected.output_pieces).content


def test_the_sdk_raises_its_own_errors(served):
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="minimind", messages=USER, temperature=9)
    with pytest.raises(openai.NotFoundError, match="gpt-5") as raised:
        client.chat.completions.create(model="gpt-5", messages=USER)
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert [model.id for model in client.models.list()] == ["minimind"] == [client.models.retrieve("minimind").id]


def test_unknown_paths_methods_and_media_are_refused(served):
    for path, reason in (("/v1/embeddings", "no embedding model"), ("/v1/messages", "chat/completions"),
                         ("/v1/nothing", "no /v1/nothing")):
        response = served.post(path, json={"model": "minimind", "input": "x"})
        assert response.status_code == 404 and reason in response.json()["error"]["message"]
    assert "not stored" in httpx.get(f"{served.url}/v1/responses/resp_1").json()["error"]["message"]
    for response, status in ((served.post("/v1/nothing"), 404), (httpx.get(f"{served.url}/v1/chat/completions"), 405),
                             (served.post(content=json.dumps({"messages": USER})), 400)):
        assert response.status_code == status and response.json()["error"]["message"]


def test_unknown_fields_are_ignored_and_null_is_left_out(served):
    body = {"messages": [WHO[0] | {"name": "me", "mood": 1}], "temperature": 0, "user": "u", "n": None, "stop": None,
            "tools": None, "nonsense": {"a": [1]}, "max_tokens": None, "stream": None, "logit_bias": {}}
    assert served.post(json=body).json()["choices"][0]["message"]["content"] == WHO[1]["content"]
    developer = served.post(json={"messages": [{"role": "developer", "content": "x"}, *USER], "max_tokens": 1})
    assert developer.json()["usage"]["prompt_tokens"] == len(TOKENIZER.prompt(
        [{"role": "system", "content": "x"}, *USER]))


@pytest.mark.parametrize("size", [MAX_BODY + 1, 3 * MAX_BODY])
def test_too_large_a_body_is_refused(served, size):
    response = served.post(content=b" " * size, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and "bytes" in response.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_back(wild):
    with serving(wild, max_batch=1, max_queue=1) as served:
        client = served.client()
        running, waiting = (client.chat.completions.create(model="minimind", stream=True, **LONG) for _ in range(2))
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(model="minimind", messages=USER)
        assert int(raised.value.response.headers["retry-after"]) > 0 and raised.value.code == "queue_full"
        with pytest.raises(openai.BadRequestError, match="2 at a time"):
            client.chat.completions.create(model="minimind", messages=USER, n=3)
        waiting.close()
        running.close()
        assert served.settles()
        assert client.chat.completions.create(model="minimind", messages=USER, max_tokens=1).choices


@pytest.mark.parametrize("prompts", [["1" * 40_000], ["x", "1" * 40_000, "x"]])
def test_a_refused_request_leaves_nothing_reserved(wildly, prompts):
    """Nor one of its prompts that the engine had accepted before it refused another."""
    response = wildly.post("/v1/completions", json={"prompt": prompts, "n": 2, "max_tokens": 30_000})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert wildly.settles() and wildly.service.num_pending == 0 and not wildly.service._owners


def test_a_key_opens_the_door(model):
    with serving(model, api_key="秘密", cors=["https://example.org"]) as served:
        key = "秘密".encode()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": key}):
            refused = served.post(json={"messages": USER}, headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            served.client().models.list()
        opened = served.post(json={"messages": USER, "max_tokens": 1}, headers={"Authorization": b"Bearer " + key})
        assert opened.status_code == 200
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        for method, path in (("OPTIONS", "/v1/models"), ("GET", "/v1/models")):  # a page is told why, too
            asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "GET"}
            response = httpx.request(method, served.url + path, headers=asked)
            assert response.headers["access-control-allow-origin"] == "https://example.org"
        stranger = httpx.get(f"{served.url}/v1/models", headers={"Origin": "https://elsewhere.org"})
        assert "access-control-allow-origin" not in stranger.headers


def broken_engine(*_) -> None:
    raise RuntimeError("out of memory: secret details")


def test_a_broken_engine_fails_its_requests_and_no_others(wild, monkeypatch, capfd):
    with serving(wild) as served:
        step = Engine.step
        monkeypatch.setattr(Engine, "step", broken_engine)
        with pytest.raises(openai.InternalServerError, match="server failed") as raised:
            served.chat(USER)
        assert "secret" not in raised.value.message and "Traceback" not in raised.value.response.text
        stream = served.chat(USER, stream=True)
        with pytest.raises(openai.APIError, match="server failed"):
            list(stream)
        *_, last = respond(served, USER, stream=True)
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert "server failed" in last.response.error.message
        assert served.settles()
        monkeypatch.setattr(Engine, "step", step)
        assert served.chat(USER, max_tokens=2).choices[0].finish_reason == "length"
        assert "secret details" in capfd.readouterr().err  # the operator is told
        metrics = httpx.get(f"{served.url}/metrics").text
        assert 'minimind_requests_total{path="/v1/chat/completions",status="500"}' in metrics


def test_an_engine_that_cannot_be_replaced_fails_each_request_until_it_can(wild, monkeypatch):
    with serving(wild, cors=["*"]) as served:
        new_engine, step = served.service._new_engine, Engine.step
        monkeypatch.setattr(served.service, "_new_engine", broken_engine)
        monkeypatch.setattr(Engine, "step", broken_engine)
        for _ in range(2):
            refused = served.post(json={"messages": USER}, headers={"Origin": "https://example.org"})
            assert refused.status_code == 500 and refused.headers["access-control-allow-origin"] == "*"
        monkeypatch.setattr(Engine, "step", step)
        monkeypatch.setattr(served.service, "_new_engine", new_engine)
        assert served.chat(USER, max_tokens=2).choices[0].finish_reason == "length"
        assert served.service.num_pending == 0


# -- the server --------------------------------------------------------------------------------------------------------


def test_a_signal_finishes_what_runs_and_refuses_what_is_new(wild):
    with serving(wild) as served:
        stream = served.chat(USER, stream=True, max_tokens=400)
        first = next(iter(stream))
        served.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as raised:
            served.chat(USER)
        assert raised.value.status_code == 503 and raised.value.code == "stopping"
        assert httpx.get(f"{served.url}/health").status_code == 503
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) > 100
        served.thread.join(60)
        assert not served.thread.is_alive()


def test_metrics_are_read_by_prometheus(wild):
    with serving(wild, max_batch=3) as served:
        served.chat(USER, max_tokens=4)
        served.post(json={})
        families = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
        samples = {(sample.name, *sample.labels.values()): sample.value for family in families
                   for sample in family.samples}
        assert samples["minimind_requests_total", "/v1/chat/completions", "200"] == 1
        assert samples["minimind_requests_total", "/v1/chat/completions", "400"] == 1
        assert samples["minimind_generated_tokens_total",] == 4
        assert samples["minimind_prompt_tokens_total",] == len(TOKENIZER.prompt(USER))
        assert samples["minimind_time_to_first_token_seconds_bucket", "+Inf"] == 1
        assert samples["minimind_places",] == 3 and samples["minimind_sequences_running",] == 0


def test_the_schema_tells_both_shapes_of_an_answer(served):
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert paths[path]["post"]["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}


@pytest.mark.parametrize("mode", GenerationMode)
def test_schemathesis_finds_nothing(mode):
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    tiny = MiniMindForCausalLM(MiniMindConfig(**SMALL, max_position_embeddings=96)).eval()
    with serving(tiny) as served:
        for operation in schemathesis.openapi.from_url(f"{served.url}/openapi.json").get_all_operations():
            if mode is GenerationMode.NEGATIVE and operation.ok().method != "post":
                continue  # nothing can be wrong with it

            @hypothesis.settings(max_examples=20, deadline=None, database=None, derandomize=True,
                                 suppress_health_check=list(hypothesis.HealthCheck))
            @hypothesis.given(case=operation.ok().as_strategy(generation_mode=mode))
            def call(case):
                case.call_and_validate(checks=checks)

            call()
        assert served.settles()


def test_the_program_serves_and_its_client_chats(model, tmp_path):
    save_weight(model, "full_sft", tmp_path, TOKENIZER)
    command = [sys.executable, ROOT / "scripts/serve_openai_api.py", f"--save_dir={tmp_path}", "--port=0",
               "--device=cpu", "--temperature=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"MINIMIND_API_KEY": "key"}, **pipes) as server:
        try:
            url = server.stdout.readline().split()[-1]
            client = openai.OpenAI(base_url=url, api_key="key")
            answer = client.chat.completions.create(model="minimind", messages=WHO[:1])
            assert answer.choices[0].message.content == WHO[1]["content"]
            taken = subprocess.run([*command[:2], f"--port={url.split(':')[2].split('/')[0]}"], capture_output=True,
                                   text=True)
            assert taken.returncode == 2 and "--port" in taken.stderr and len(taken.stderr.splitlines()) == 1
        finally:
            server.terminate()
            _, said = server.communicate(timeout=60)
        assert "Traceback" not in said
        if os.name != "nt":
            assert server.returncode == 0


def test_inference_imports_nothing_of_training_but_the_tools():
    program = ("import sys, eval_llm, scripts.serve_openai_api, scripts.chat_api, scripts.web.answers\n"
               "print(*(name for name in sys.modules if name.split('.')[0] in ('trainer', 'dataset')))")
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == {"trainer", "trainer.rl", "trainer.rl.builtin_tools", "trainer.rl.tools"}


# -- the client --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(monkeypatch, capsys) -> Callable[..., str]:
    """Run chat_api.py with flags; → what it prints."""

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["chat_api.py", *flags])
        monkeypatch.setattr(chat_api, "SCHEMAS", {name: SCHEMAS[name] for name in ("text_length", "random_number")})
        run_main(chat_api.main)
        return capsys.readouterr().out

    return run


def test_the_client_runs_the_tools_it_offers(served, ask):
    said = ask(f"--base_url={served.url}/v1", "--prompt=How long?", "--tools", "--temperature=0")
    assert said.split("\n", 1)[1] == '[text_length {"text": "巴黎"} → {"characters": 2, "words": 1}]\nTwo characters.\n'


def test_the_client_shows_thinking(served, ask):
    said = ask(f"--base_url={served.url}/v1", "--prompt=2 + 2?", "--open_thinking=1", "--temperature=0")
    assert "Two and two." in said and said.rstrip().endswith("Four.")


def test_the_clients_mistakes_are_told_in_one_line(served, ask, capsys):
    for flags, said in ((["--base_url=http://127.0.0.1:9/v1"], "no server"),
                        ([f"--base_url={served.url}/v1", "--model=gpt-5"], "gpt-5")):
        with pytest.raises(SystemExit, match="2"):
            ask("--prompt=x", *flags)
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
