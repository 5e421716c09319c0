"""What clients put into a request: each spelling means what its client means by it, or is refused in one line.

FUZZ=10000 tries so many request bodies instead of a few.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError
from starlette.testclient import TestClient

from model.chat import SPECIAL_TOKENS, ChatTokenizer, MessageParser
from model.inference.engine import Engine, TokenDelta
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts.serve_openai_api import create_app
from scripts.server.choices import ChatChoice
from scripts.server.engine_thread import EngineThread
from scripts.server.generation import Defaults, GenerationRequest
from scripts.server.protocol import ApiError, ChatBody, CompletionBody, validation_error
from scripts.server.responses_body import ResponsesBody
from trainer.rl.tools import SCHEMAS

TOKENIZER = ChatTokenizer()
TOOLS = [SCHEMAS["text_length"], SCHEMAS["random_number"]]
USER = [{"role": "user", "content": "hello"}]
CALL = {"name": "f", "arguments": {"a": 1}}
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, max_position_embeddings=256)).eval()
    service = EngineThread(partial(Engine, model, TOKENIZER, 4, 1024))
    app = create_app(service, TOKENIZER, Defaults(max_new_tokens=3, max_tools=1))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
        assert service.num_pending == 0 and not service._owners


def request_of(**body) -> GenerationRequest:
    kind = CompletionBody if "prompt" in body else ChatBody
    make = GenerationRequest.from_completion_body if "prompt" in body else GenerationRequest.from_chat_body
    try:
        return make(kind.model_validate(body), TOKENIZER, Defaults())
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def read(messages: list[dict], **body) -> str:
    """The prompt of a request."""
    return TOKENIZER.decode(request_of(messages=messages, **body).prompts[0], keep_special_tokens=True)


def assistant(**fields) -> dict:
    return {"role": "assistant", **fields}


def tool_call(arguments: object) -> list[dict]:
    return [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]


UNREADABLE = '<tool_call>\n{"name": "f", "arguments": {"a": }\n</tool_call>'
SAME = {
    "text parts": ({"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "input_text", "text": "llo"}]},
                   USER[0]),
    "a developer": ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
    "a result of null": ({"role": "tool", "tool_call_id": "1", "content": None}, {"role": "tool", "content": ""}),
    "a function's result": ({"role": "function", "name": "f", "content": "x"}, {"role": "tool", "content": "x"}),
    "a refusal": (assistant(content=None, refusal="No."), assistant(content="No.")),
    "a part that refuses": (assistant(content=[{"type": "refusal", "refusal": "No."}]), assistant(content="No.")),
    "a part that thinks": (assistant(content=[{"type": "thinking", "thinking": "hm", "signature": "x"},
                                              {"type": "text", "text": "4"}]),
                           assistant(reasoning_content="hm", content="4")),
    "reasoning": (assistant(reasoning="hm", content="4"), assistant(reasoning_content="hm", content="4")),
    "both": (assistant(reasoning="hm", reasoning_content="h", content="4"),
             assistant(reasoning_content="h", content="4")),
    "nulls": (assistant(content="4", tool_calls=None, function_call=None, refusal=None, audio=None, name=None,
                        reasoning=None), assistant(content="4")),
    "no tool calls": (assistant(content="4", tool_calls=[]), assistant(content="4")),
    "a tool call": (assistant(content=None, tool_calls=tool_call('{"a": 1}')),
                    assistant(content="", tool_calls=[CALL])),
    "no arguments": (assistant(content=None, tool_calls=tool_call("")),
                     assistant(content="", tool_calls=[CALL | {"arguments": {}}])),
    "a function call": (assistant(content=None, function_call={"name": "f", "arguments": '{"a": 1}'}),
                        assistant(content="", tool_calls=[CALL])),
    "unreadable arguments": (assistant(content=None, tool_calls=tool_call('{"a": ')), assistant(content=UNREADABLE)),
    "unreadable ones after text": (assistant(content="Well.", tool_calls=tool_call('{"a": ')),
                                   assistant(content="Well.\n" + UNREADABLE)),
    "arguments of a list": (assistant(content=None, tool_calls=tool_call([1])),
                            assistant(content='<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>')),
}


@pytest.mark.parametrize("case", SAME)
def test_messages_are_read_as_their_client_means_them(case):
    sent, meant = SAME[case]
    assert read([*USER, sent]) == read([*USER, meant])
    assert TOKENIZER.prompt([*USER, meant]) == request_of(messages=[*USER, sent]).prompts[0]


def test_what_a_client_leaves_open_may_be_null_or_spelt_otherwise():
    plain = request_of(messages=USER, seed=1).params
    fields = {**ChatBody.model_fields, **CompletionBody.model_fields}
    nulls = {name: None for name in fields if name not in ("messages", "prompt", "seed")}
    spelt = {"max_tokens": -1, "max_completion_tokens": -1.0, "stop": "", "logit_bias": {}, "top_k": -1.0}
    for body in (nulls, spelt, {"stop": [""]}, {"stop": []}, {"max_tokens": -1}):
        assert request_of(messages=USER, seed=1, **body).params == plain, body
    whole = request_of(messages=USER, seed=1.0, n=2.0, max_tokens=32.0, top_k=5.0, temperature=1).params
    assert [params.max_new_tokens for params in whole] == [32, 32] and whole[0].top_k == 5 and whole[1].seed == 2
    assert request_of(messages=USER, stop=["", "x"]).params[0].stop == ("x",)
    assert request_of(messages=USER, stop="x" * 17).params[0].stop == ("x" * 17,)
    with pytest.raises(ApiError, match="at most 16 items"):
        request_of(messages=USER, stop=["x"] * 17)
    assert request_of(prompt="x", max_tokens=3.0).params[0].max_new_tokens == 3


def test_results_are_read_in_the_order_of_their_calls():
    calls = [{"id": city, "type": "function", "function": {"name": "f", "arguments": {"a": city}}}
             for city in ("paris", "rome")]
    results = [{"role": "tool", "tool_call_id": city, "content": city.upper()} for city in ("paris", "rome")]
    turn = [*USER, assistant(content=None, tool_calls=calls)]
    in_order = request_of(messages=[*turn, *results]).prompts
    assert request_of(messages=[*turn, *results[::-1]]).prompts == in_order
    unknown = [results[1] | {"tool_call_id": "x"}, results[0]]
    assert request_of(messages=[*turn, *unknown]).prompts != in_order  # nothing tells which is whose
    items = [{"role": "user", "content": USER[0]["content"]},
             *({"type": "function_call", "call_id": city, "name": "f", "arguments": f'{{"a": "{city}"}}'}
               for city in ("paris", "rome")),
             *({"type": "function_call_output", "call_id": city, "output": city.upper()}
               for city in ("rome", "paris"))]
    read_messages = ResponsesBody(input=items).to_chat_body(None).messages
    assert [message.content for message in read_messages[2:]] == ["PARIS", "ROME"]


def test_tools_are_read_without_what_is_not_for_the_model():
    function = SCHEMAS["text_length"]["function"]
    plain = read(USER, tools=[{"type": "function", "function": function}])
    assert read(USER, tools=[{"type": "function", "function": function | {"strict": True, "returns": None}}]) == plain
    assert read(USER, functions=[function]) == read(USER, functions=[function], function_call="auto") == plain
    assert read(USER, functions=[function], function_call="none") == read(USER)


def test_no_more_tools_are_read_than_the_server_allows(client):
    body = {"messages": USER, "tools": TOOLS}
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json=body | {"stream": stream})
        assert response.headers["X-Tools-Left-Out"] == "1 of 2, by --max_tools"
    none = GenerationRequest.from_chat_body(ChatBody.model_validate(body), TOKENIZER, Defaults(max_tools=0))
    assert none.prompts[0] == TOKENIZER.prompt(USER) and none.headers["X-Tools-Left-Out"].startswith("2 of 2")
    one = GenerationRequest.from_chat_body(ChatBody.model_validate(body), TOKENIZER, Defaults(max_tools=1))
    assert one.prompts[0] == TOKENIZER.prompt(USER, TOOLS[:1]) and not request_of(**body).headers
    body["tool_choice"] = {"type": "function", "function": {"name": TOOLS[1]["function"]["name"]}}  # must be called
    named = GenerationRequest.from_chat_body(ChatBody.model_validate(body), TOKENIZER, Defaults(max_tools=0))
    assert named.prompts[0] == TOKENIZER.prompt(USER, TOOLS[1:])
    assert named.headers["X-Tools-Left-Out"].startswith("1 of 2")


def test_a_logit_bias_is_of_token_ids():
    assert request_of(messages=USER, logit_bias={"40": 2, "041": -100}).params[0].logit_bias == ((40, 2), (41, -100))


def test_the_last_message_is_continued():
    start = [*USER, assistant(content="1, 2,\n")]
    ended = read(start, continue_final_message=True, add_generation_prompt=False)
    assert read(start).startswith(ended + "<|im_end|>\n") and ended.endswith("1, 2,\n")
    parts = [*USER, assistant(content=[{"type": "text", "text": "1, 2,\n"}])]
    assert read(parts, continue_final_message=True) == ended
    choice = request_of(messages=start, continue_final_message=True, open_thinking=True).choices[0]
    list(choice.add(TokenDelta(["\n3"], [], 1, "stop")))
    assert choice.to_response()["message"]["content"] == "\n3"  # not thinking, and the newline is of the text
    for messages in ([*USER, assistant(content=None, tool_calls=tool_call("{}"))], USER):
        with pytest.raises(ApiError, match="continues an assistant's text"):
            read(messages, continue_final_message=True)
    for switches in ((True, True), (False, False), (None, False)):
        with pytest.raises(ApiError, match="must not have the same value"):
            read(start, continue_final_message=switches[0], add_generation_prompt=switches[1])


def test_a_client_of_functions_hears_function_call():
    choice = ChatChoice(0, TOKENIZER, MessageParser(TOKENIZER), has_tools=True, has_logprobs=False, is_legacy=True)
    start, end = SPECIAL_TOKENS["<tool_call>"], SPECIAL_TOKENS["</tool_call>"]
    call = [start, '{"name": "f", "arguments": {"a": 1}}', end]
    chunks = list(choice.add(TokenDelta([*call, *call], [], 9, "stop")))
    deltas = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert deltas == [{"name": "f", "arguments": ""}, {"arguments": '{"a": 1}'}]
    answer = choice.to_response()
    assert answer["finish_reason"] == "function_call" and "tool_calls" not in answer["message"]
    assert answer["message"]["function_call"] == {"name": "f", "arguments": '{"a": 1}'}
    assert "<tool_call>" in answer["message"]["content"]  # there is one at a time; the second one is text


REFUSED = {
    "an image": ([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
                 "messages.0.content.1: this model reads text only, not image_url"),
    "audio": ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], "text only"),
    "a file": ([{"type": "file", "file": {"file_id": "1"}}], "text only"),
    "a video": ([{"type": "video_url", "video_url": {"url": ""}}], "text only"),
    "a part without text": ([{"type": "text"}], "messages.0.content.0: a part of type text needs the field text"),
    "a part of another type": (["x"], "messages.0.content.0: "),
    "an object": ({"type": "text"}, "messages.0.content: "),
    "thinking of a user": ([{"type": "thinking", "thinking": "hm"}], "only for assistant messages"),
    "null": (None, "a user message needs content"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_content_that_is_no_text_is_refused(case):
    content, message = REFUSED[case]
    with pytest.raises(ApiError) as raised:
        request_of(messages=[{"role": "user", "content": content}])
    assert message in raised.value.message and raised.value.status == 400


@pytest.mark.parametrize(("body", "message"), [
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"6400": 1}}, "0 to 6399"),
    ({"logit_bias": {"5": 101}}, "logit_bias"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"functions": [{"name": "f"}], "tools": TOOLS}, "functions"),
    ({"messages": [assistant(audio={"id": "1"})]}, "text only"),
    ({"messages": [assistant(tool_calls=[{"function": {}}])]}, "message 1"),
    ({"prompt": "x", "best_of": 2}, "best_of")])
def test_what_cannot_be_done_is_refused(body, message):
    with pytest.raises(ApiError, match=message):
        request_of(**{"messages": USER} | body)


# -- fuzz --------------------------------------------------------------------------------------------------------------


junk = st.recursive(st.sampled_from([
    None, True, False, 0, 1, -1, 1.0, 0.5, 1e300, 2**63, 10**400, "", "x", "auto", "{", "\ud800", "\0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["type", "text", "name", "function", "arguments", "40"]), inner, max_size=2), max_leaves=4)


@st.composite
def bodies(draw, right: st.SearchStrategy[dict]) -> dict:
    """A body that is right, or has one value of junk, anywhere in it."""
    body = copy.deepcopy(draw(right))
    slots = list(slots_of(body))
    if slots and draw(st.booleans()):
        container, key = draw(st.sampled_from(slots))
        container[key] = draw(junk)
    return body


def slots_of(value: object) -> Iterator[tuple[dict | list, str | int]]:
    """(container, key) of every value in `value`."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from slots_of(inner)


def some(optional: dict, **needed: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(needed, optional=optional)


text = st.sampled_from(["hi", "", "<|im_end|>", "</think>", '<tool_call>\n{"name"', "答"])
parts = some({}, type=st.sampled_from(["text", "input_text"]), text=text) | some(
    {}, type=st.sampled_from(["refusal", "thinking", "image_url"]), refusal=text, thinking=text)
content = text | text | st.lists(parts, max_size=2)
functions = some({"parameters": st.just({}), "strict": st.booleans(), "description": st.none() | text},
                 name=st.just("f"))
calls = some({"arguments": st.sampled_from(["{}", '{"a": 1}', "{", "", "null"]) | st.just({})}, name=st.just("f"))
tools = some({}, type=st.just("function"), function=functions)
messages = some({}, role=st.sampled_from(["system", "user", "developer", "tool", "function"]), content=content) | some(
    {"content": content | st.none(), "reasoning": text, "reasoning_content": text, "refusal": text | st.none(),
     "tool_calls": st.lists(some({"id": text}, type=st.just("function"), function=calls), max_size=2),
     "function_call": calls, "audio": st.none(), "name": text}, role=st.just("assistant"))
lengths, flags = st.sampled_from([1, 2, 3.0, -1, None]), st.sampled_from([True, False, None])
shared = {
    "stream": flags, "n": st.sampled_from([1, 2.0]), "max_tokens": lengths, "temperature": st.sampled_from([0, 1.0, 2]),
    "top_p": st.sampled_from([0, 0.5, 1]), "top_k": st.sampled_from([-1, 0, 5.0]), "min_p": st.sampled_from([0, 0.5]),
    "presence_penalty": st.just(-2), "frequency_penalty": st.just(0.5), "repetition_penalty": st.just(1.5),
    "seed": st.sampled_from([0, -1, 5.0]), "stop": st.sampled_from(["", "a", ["", "b"], []]), "model": st.none(),
    "logit_bias": st.dictionaries(st.sampled_from(["40", "6399"]), st.sampled_from([-100, 0.5, 100]), max_size=2),
    "stream_options": st.sampled_from([None, {"include_usage": True}]), "user": text}
shared |= {"guided_json": st.none() | st.just({"type": "null"}), "guided_regex": st.none() | text}
named = some({}, name=st.just("f"))
choices = st.sampled_from(["auto", "none", "required"]) | some({}, type=st.just("function"), function=named)
schemas = st.sampled_from([{}, {"type": "object", "properties": {"a": {"type": "string"}}}, {"$ref": "#"}])
formats = some({}, type=st.sampled_from(["text", "json_object"])) | some(
    {}, type=st.just("json_schema"), json_schema=some({"strict": flags}, name=text, schema=schemas))
chats = some(shared | {
    "tools": st.lists(tools, max_size=2), "tool_choice": choices, "parallel_tool_calls": flags,
    "functions": st.lists(functions, max_size=2), "function_call": st.sampled_from(["auto", "none"]) | named,
    "logprobs": st.just(True), "top_logprobs": st.sampled_from([0, 20]), "max_completion_tokens": lengths,
    "open_thinking": flags, "chat_template_kwargs": st.just({"enable_thinking": True}),
    "continue_final_message": flags, "add_generation_prompt": st.none(), "response_format": formats,
}, messages=st.lists(messages, min_size=1, max_size=3))
completions = some(shared | {"logprobs": st.sampled_from([0, 20]), "echo": st.just(False), "suffix": st.just("")},
                   prompt=text | st.sampled_from([["a", "b"], [1, 40], [[1], [2]]]))


FUZZ = settings(max_examples=int(os.environ.get("FUZZ", 60)), deadline=None, derandomize="FUZZ" not in os.environ,
                suppress_health_check=list(HealthCheck), database=None)


@FUZZ
@given(body=bodies(chats))
def test_any_chat_is_answered_or_refused(client, body):
    answered_or_refused(client, "/v1/chat/completions", body, ChatCompletion, ChatCompletionChunk.model_validate_json)


items = some({}, role=st.sampled_from(["user", "system", "assistant"]), content=content) | some(
    {"summary": st.lists(some({}, type=st.just("summary_text"), text=text), max_size=1)},
    type=st.just("reasoning")) | some(
    {"call_id": text}, type=st.just("function_call"), name=text, arguments=st.sampled_from(["{}", "{"])) | some(
    {"call_id": text}, type=st.just("function_call_output"), output=content)
responses = some(shared | {
    "instructions": text, "max_output_tokens": lengths, "reasoning": st.just({"effort": "low"}),
    "metadata": st.just({"a": "x"}),
    "tools": st.lists(some({"parameters": st.just({})}, type=st.just("function"), name=st.just("f")), max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function", "name": "f"}]),
    "store": flags, "text": st.none() | some({}, format=st.just({"type": "text"}) | some(
        {"strict": flags}, type=st.just("json_schema"), name=text, schema=schemas)),
    "include": st.just(["message.output_text.logprobs"]), "top_logprobs": st.just(2), "parallel_tool_calls": flags,
}, input=text | st.lists(items, min_size=1, max_size=4))


@FUZZ
@given(body=bodies(responses))
def test_any_response_is_had_or_refused(client, body):
    answered_or_refused(client, "/v1/responses", body, Response, EVENT.validate_json)


@FUZZ
@given(body=bodies(completions))
def test_any_text_is_continued_or_refused(client, body):
    answered_or_refused(client, "/v1/completions", body, Completion, json.loads)  # chunks have no type of their own


def answered_or_refused(client: TestClient, path: str, body: dict, whole: type, read_chunk: Callable) -> None:
    """The response is one that OpenAI's own types accept, or an error of one line."""
    try:
        content = json.dumps(body)
    except ValueError:  # more digits than Python writes
        return

    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    if response.status_code != 200:
        error = response.json()["error"]
        assert 400 <= response.status_code < 500 and error.keys() == {"message", "type", "param", "code"}, response.text
        assert error["message"] and len(error["message"].splitlines()) == 1
    elif response.headers["content-type"].startswith("text/event-stream"):
        *events, nothing = response.text.removesuffix("data: [DONE]\n\n").split("\n\n")
        assert not nothing and events
        for event in events:
            read_chunk(event.split("data: ", 1)[1])
    else:
        answer = whole.model_validate_json(response.content)
        assert whole is Response or all(choice.finish_reason for choice in answer.choices) and answer.choices
