"""Structured outputs of a random model: jsonschema, Python's re and OpenAI's SDK find nothing wrong with them."""

import json
import math
import re
import sys
from collections.abc import Iterator
from enum import Enum
from functools import partial

import jsonschema
import openai
import pytest
import torch
from lab import TOKENIZER, small_model
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from model.chat import CALL, END_THINK, EOS, SPECIAL_TOKENS, parse_message
from model.inference.constraints import Grammar, allowed_tokens, chat_grammar, json_rule, regex_rule, text_grammar
from model.inference.engine import Engine, SamplingParams, generate
from scripts.serve_openai_api import create_app
from scripts.server.engine_thread import EngineThread
from scripts.server.generation import Defaults

USER = [{"role": "user", "content": "Weather?"}]
PROMPT = TOKENIZER.prompt(USER)
CITY = {"type": "object", "properties": {"city": {"enum": ["北京", "New \"York\""]}}, "required": ["city"]}
CLOSED_CITY = CITY | {"additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
         {"type": "function", "function": {"name": "now"}}]
SCHEMAS = [
    {"type": "boolean"}, {"enum": [1, "一", None]}, {"type": "integer", "minimum": 3, "maximum": 12}, CLOSED_CITY,
    {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[a-c]{2,5}$"}, {"type": "string", "format": "date"},
    {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}],
     "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["\n", "\\"]}], "items": False,
                        "minItems": 2}}},
    {"type": "object", "properties": {"a": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 2},
                                      "b": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}]
REGEXES = [r"\d{3}/[a-c]x", "是|不", r"[^\n]{1,4}\n", r"(ab|\")*c"]


def answers(grammars: list[Grammar | None], model=None, **options) -> list:
    params = [SamplingParams(**{"max_new_tokens": 300, "temperature": 1.0, "top_p": 1.0, **options}, seed=i, grammar=g)
              for i, g in enumerate(grammars)]
    return generate(model or small_model().eval(), [PROMPT] * len(grammars), params, TOKENIZER)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.5}])
def test_json_of_a_random_model_is_valid_and_written_as_ours(options):
    schemas = SCHEMAS * 3
    grammars = [text_grammar(TOKENIZER, json_rule(schema)) for schema in schemas]
    for schema, sequence in zip(schemas, answers(grammars, **options), strict=True):
        assert sequence.finish_reason == "stop" and sequence.completion_ids[-1] == EOS
        value = json.loads(sequence.text)
        jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
        assert sequence.text == json.dumps(value, ensure_ascii=False) or "multipleOf" in str(schema)  # 1.50


def test_text_by_a_regular_expression_matches_it():
    for regex, sequence in zip(REGEXES * 5, answers([text_grammar(TOKENIZER, regex_rule(r)) for r in REGEXES * 5]),
                               strict=True):
        assert sequence.finish_reason == "stop" and re.fullmatch(regex, sequence.text)


def test_an_answer_may_be_cut():
    sequence, = answers([text_grammar(TOKENIZER, json_rule({"type": "string"}))], max_new_tokens=5)
    assert sequence.finish_reason == "length" and sequence.text.startswith('"') and len(sequence.completion_ids) == 5


def test_only_constrained_sequences_are_changed_and_padding_of_the_vocabulary_is_never_sampled():
    grammar = text_grammar(TOKENIZER, regex_rule("(a|b|c)*"))
    model = small_model(vocab_size=6500).eval()
    free = answers([None, None, None], model, max_new_tokens=12)
    mixed = answers([None, grammar, None], model, max_new_tokens=12)
    assert [free[i].completion_ids for i in (0, 2)] == [mixed[i].completion_ids for i in (0, 2)]
    assert re.fullmatch("[abc]*", mixed[1].text) and free[1].completion_ids != mixed[1].completion_ids
    assert text_grammar(TOKENIZER, regex_rule("b")).accept(TOKENIZER.encode_text("b")[0])  # states are apart
    allowed = allowed_tokens([None, grammar], 6500)
    assert allowed[0].all() and not allowed[1, TOKENIZER.vocab_size:].any()


def test_log_probabilities_are_those_of_the_allowed_tokens():
    for temperature in (0, 1.0):
        sequence, = answers([text_grammar(TOKENIZER, regex_rule("a|b|c"))], temperature=temperature, top_logprobs=20)
        (token, logprob), first = (sequence.completion_ids[0], sequence.logprobs[0]), sequence.top_logprobs[0]
        assert {TOKENIZER.decode([i]) for i, _ in first} == {"a", "b", "c"} and dict(first)[token] == logprob
        assert sum(math.exp(value) for _, value in first) == pytest.approx(1)
        assert sequence.logprobs[1] == 0 and sequence.top_logprobs[1] == [(EOS, 0.0)]


def test_thinking_is_free_before_the_answer():
    grammars = [chat_grammar(TOKENIZER, True, json_rule(CLOSED_CITY))] * 12
    thoughts = []
    for sequence in answers(grammars, logit_bias=((END_THINK, 7.5),)):  # which a random model seldom writes
        message = parse_message(TOKENIZER, sequence.completion_ids, open_thinking=True)
        jsonschema.validate(json.loads(message.content), CLOSED_CITY)
        assert sequence.finish_reason == "stop"
        assert set(SPECIAL_TOKENS.values()) & set(sequence.completion_ids) == {END_THINK}
        thoughts.append(message.reasoning)
    assert len(set(thoughts)) > 6 and max(map(len, thoughts)) > 20


def calls_of(sequence) -> list[dict]:
    """The calls of a turn, each of which a tool takes."""
    message = parse_message(TOKENIZER, sequence.completion_ids)
    assert not message.malformed and sequence.finish_reason == "stop"
    for call in message.tool_calls:
        if call["name"] == "get_weather":
            jsonschema.validate(call["arguments"], CLOSED_CITY)
        else:
            assert call == {"name": "now", "arguments": {}}
    return message.tool_calls


def test_calls_are_of_the_tools_that_were_offered():
    required, alone = (chat_grammar(TOKENIZER, tools=TOOLS, call_required=True, parallel_calls=parallel)
                       for parallel in (True, False))
    assert {len(calls_of(sequence)) for sequence in answers([alone] * 8)} == {1}
    assert {len(calls_of(sequence)) for sequence in answers([required] * 16)} > {1}


def test_a_call_that_is_required_comes_even_where_a_schema_of_the_answer_is_given():
    grammar = chat_grammar(TOKENIZER, answer=json_rule(CLOSED_CITY), tools=TOOLS, call_required=True)
    assert all(len(calls_of(sequence)) for sequence in answers([grammar] * 8))


def test_text_may_stand_before_calls_that_are_not_required():
    grammar = chat_grammar(TOKENIZER, tools=[tool["function"] for tool in TOOLS])  # flat, as our rows may have them
    turns = answers([grammar] * 24, logit_bias=((CALL, 8.0), (EOS, 7.0)))
    starts = {(sequence.completion_ids[0] == CALL, bool(calls_of(sequence))) for sequence in turns}
    assert starts == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize("rule", ['%json {"type": "obj"}', '%json {"properties": {"a": {"$ref": "#/nowhere"}}}',
                                  '%json {"not": {}}', "/(/"])
def test_a_bad_schema_is_told_in_one_line(rule):
    with pytest.raises(ValueError, match="obj|nowhere|not|unclosed group") as refused:
        text_grammar(TOKENIZER, rule)
    assert "\n" not in str(refused.value) and "start:" not in str(refused.value)


def test_an_answer_that_is_too_complex_is_cut():
    grammar = text_grammar(TOKENIZER, regex_rule("a+"))
    grammar.accept(TOKENIZER.encode_text("b")[0])  # as where llguidance reaches one of its limits
    sequence, = answers([grammar])
    assert sequence.finish_reason == "length"


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    torch.manual_seed(0)
    service = EngineThread(partial(Engine, small_model().eval(), TOKENIZER, 8, 8192))
    with TestClient(create_app(service, TOKENIZER, Defaults(max_new_tokens=300))) as client:
        yield client


@pytest.fixture
def sdk(client) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


class Sky(Enum):
    clear, cloudy = "clear", "cloudy"


class Weather(BaseModel):
    sky: Sky
    degrees: int = Field(ge=-20, le=40)
    notes: list[str] = Field(max_length=0)
    wind: bool | None


def test_openai_parses_a_pydantic_model(sdk):
    for thinking in (False, True):
        answer = sdk.chat.completions.parse(
            model="minimind", messages=USER, response_format=Weather, n=3,
            logit_bias={END_THINK: 7}, extra_body={"open_thinking": thinking})
        for choice in answer.choices:
            assert isinstance(choice.message.parsed, Weather) and choice.finish_reason == "stop"
    with sdk.chat.completions.stream(model="minimind", messages=USER, response_format=Weather) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)


def test_json_mode_is_an_object(client):
    ends = {TOKENIZER.encode_text(text)[0]: 9 for text in '}]"'}  # likely, so that it comes to an end
    body = {"messages": USER, "response_format": {"type": "json_object"}, "logit_bias": ends, "n": 8}
    choices = client.post("/v1/chat/completions", json=body | {"seed": 0}).json()["choices"]
    texts = [choice["message"]["content"] for choice in choices if choice["finish_reason"] == "stop"]
    assert len(texts) > 4 and all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(("choice", "names"), [
    ("required", {"get_weather", "now"}), ({"type": "function", "function": {"name": "now"}}, {"now"})])
def test_a_tool_is_called_where_one_must_be(sdk, choice, names):
    called = []
    for number in range(6):
        answer = sdk.chat.completions.create(model="minimind", messages=USER, tools=TOOLS, tool_choice=choice,
                                             parallel_tool_calls=bool(number % 2), seed=number)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
        called += [call.function.name for call in message.tool_calls]
        assert len(message.tool_calls) == 1 or number % 2
    assert set(called) == names


@pytest.mark.parametrize("wish", [{"parallel_tool_calls": False}, {"tools": [
    {"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]}])
def test_calls_are_valid_where_the_tools_are_strict_or_one_may_be_called(client, wish):
    body = {"messages": USER, "tools": TOOLS, "logit_bias": {str(CALL): 7, str(EOS): 6}, "n": 24, "seed": 1} | wish
    choices = client.post("/v1/chat/completions", json=body).json()["choices"]
    calls = [choice["message"].get("tool_calls", []) for choice in choices]
    assert {len(some) for some in calls} == {0, 1}
    for call in sum(calls, []):
        if call["function"]["name"] == "get_weather":
            jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)


def test_completions_are_guided(client):
    for path, field in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": USER})):
        for guide in ({"guided_json": CLOSED_CITY}, {"guided_regex": "[0-9]{4}"}):
            choice, = client.post(path, json={**field, **guide}).json()["choices"]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert json.loads(text)["city"] if "guided_json" in guide else re.fullmatch("[0-9]{4}", text)


@pytest.mark.parametrize(("example", "kind"), [('{ "title": "A name" }', str), ('{"tags": ["a", "b"]}', list)])
def test_background_tasks_of_open_webui_are_answered_briefly(client, example, kind):
    task = f"### Task:\nName it.\n\n### Output:\nJSON format: {example}\n### Chat History:\n<chat_history>\nhi\n"
    body = {"messages": [{"role": "user", "content": task}]}
    choice, = client.post("/v1/chat/completions", json=body).json()["choices"]
    answer = json.loads(choice["message"]["content"])
    value = answer[next(iter(json.loads(example)))]
    assert len(answer) == 1 and isinstance(value, kind) and len(value) <= (60 if kind is str else 3)
    for other in (task.replace("<chat", "<"), f"I ask: {task}", task.replace('": ', '" ')):
        body = {"messages": [{"role": "user", "content": other}], "max_tokens": 9, "seed": 0}
        text = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert not text.startswith("{")


STRANGE = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "obj"}}}
REFUSED = {
    "a bad schema": ({"response_format": STRANGE}, "response_format: .*obj"),
    "a schema that cannot be kept to": ({"guided_json": {"not": {"type": "null"}}}, "guided_json: .*not"),
    "a bad regular expression": ({"guided_regex": "("}, "guided_regex: .*unclosed"),
    "two forms": ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "one of"),
    "a tool's bad schema": ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}],
                             "tool_choice": "required"}, "tools: "),
    "a tool's parameters": ({"tools": [{"type": "function", "function": {"name": "f", "parameters": True}}],
                             "tool_choice": "required"}, "tools: parameters is a dict"),
    "no tools": ({"tool_choice": "required"}, "tool_choice: there is no tool to call"),
    "an unknown tool": ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
                        "tool_choice: there is no tool x"),
    "an unknown choice": ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    "an unknown form": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "an answer that has begun": ({"messages": [*USER, {"role": "assistant", "content": "{"}], "guided_regex": "a",
                                  "continue_final_message": True}, "continue_final_message"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_to_is_refused_before_the_first_token(client, case):
    body, words = REFUSED[case]
    response = client.post("/v1/chat/completions", json={"messages": USER} | body)
    error = response.json()["error"]
    assert response.status_code == 400 and re.search(words, error["message"]) and "\n" not in error["message"]


def test_without_the_library_free_answers_are_given_and_others_refused(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"messages": USER, "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    response = client.post("/v1/chat/completions", json=body | {"response_format": {"type": "json_object"}})
    assert response.status_code == 400 and "pip install llguidance" in response.json()["error"]["message"]
