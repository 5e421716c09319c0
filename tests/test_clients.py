"""Clients that we did not write, with their defaults, against the server over HTTP: docs/clients.md lists them.

Those that are large, or want other versions of what we have, are tested where they are installed.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from test_server import CALL, ITEM_TOOLS, SUM, TASK, TOKENIZER, TOOLS, WHO, model, served  # noqa: F401 (fixtures)

from model.weights import ROOT

# ruff: noqa: F811 (fixtures are imported)
QUESTION, ANSWER, RESULT = TASK[0]["content"], TASK[3]["content"], TASK[2]["content"]


class Verdict(BaseModel):
    """What any answer fits into in a few tokens."""

    right: bool
    side: Literal["left", "middle"]


@pytest.mark.parametrize("stream", [False, True])
def test_openai_agents(served, stream):
    """openai-agents asks /v1/responses unless it is told otherwise."""
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    calls = []

    async def invoke(_, arguments: str) -> str:
        calls.append(json.loads(arguments))
        return TASK[2]["content"]

    tools = [agents.FunctionTool(name=tool["name"], description=tool["description"], on_invoke_tool=invoke,
                                 params_json_schema=tool["parameters"], strict_json_schema=False)
             for tool in ITEM_TOOLS]

    async def run() -> str:
        async with served.client(openai.AsyncOpenAI) as client:
            model = agents.OpenAIResponsesModel("minimind", client)
            agent = agents.Agent("a", model=model, tools=tools, model_settings=agents.ModelSettings(temperature=0))
            if not stream:
                return (await agents.Runner.run(agent, TASK[0]["content"])).final_output
            result = agents.Runner.run_streamed(agent, TASK[0]["content"])
            kinds = [event.type async for event in result.stream_events()]
            assert "raw_response_event" in kinds
            return result.final_output

    assert asyncio.run(run()) == TASK[3]["content"] and calls == [CALL["arguments"]]


def test_ai_sdk(served, monkeypatch):
    """It asks /v1/responses, and refers to the items of earlier answers."""
    node = Path(os.environ.get("MINIMIND_NODE", Path.home() / ".cache/minimind/node"))
    if not (node / "node_modules/@ai-sdk/openai").is_dir() or not shutil.which("node"):
        pytest.skip(f"no node, or no @ai-sdk/openai in {node}; .ci/run installs it, MINIMIND_NODE names another folder")
    prompts, add = [], served.service.engine.add
    monkeypatch.setattr(served.service.engine, "add", lambda prompt, params: prompts.append(prompt) or add(
        prompt, params))
    request = {"url": f"{served.url}/v1", "question": TASK[0]["content"], "tools": ITEM_TOOLS,
               "result": TASK[2]["content"]}
    done = subprocess.run(["node", ROOT / "tests/ai_sdk.mjs"], input=json.dumps(request), capture_output=True,
                          encoding="utf-8", timeout=120, env=os.environ | {"MINIMIND_NODE": str(node)})
    assert done.returncode == 0, done.stderr
    answer = TASK[3]["content"]
    assert json.loads(done.stdout) == {"whole": answer, "text": answer, "calls": [CALL["arguments"]]}
    turns = [TOKENIZER.prompt(TASK[:1], TOOLS), TOKENIZER.prompt(TASK[:3], TOOLS)]
    assert prompts[:5] == [*turns, *turns, TOKENIZER.prompt([*TASK, {"role": "user", "content": "?"}], TOOLS)]


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(served, responses):
    openai_models = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage

    chat = openai_models.ChatOpenAI(model="minimind", base_url=f"{served.url}/v1", api_key="none", temperature=0,
                                    max_tokens=99, use_responses_api=responses)
    assert chat.invoke(WHO[0]["content"]).text == WHO[1]["content"]
    assert "".join(chunk.text for chunk in chat.stream(WHO[0]["content"])) == WHO[1]["content"]
    call = chat.bind_tools(TOOLS).invoke(QUESTION)
    assert [(each["name"], each["args"]) for each in call.tool_calls] == [tuple(CALL.values())]
    result = ToolMessage(RESULT, tool_call_id=call.tool_calls[0]["id"])
    assert chat.bind_tools(TOOLS).invoke([HumanMessage(QUESTION), call, result]).text == ANSWER
    assert chat.bind_tools(TOOLS, tool_choice="any").invoke("hello").tool_calls
    assert isinstance(chat.with_structured_output(Verdict).invoke("hello"), Verdict)


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai(served, kind):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{served.url}/v1", api_key="none")
    options = {"model": getattr(models, kind)("minimind", provider=provider),
               "model_settings": {"temperature": 0, "max_tokens": 99}}
    first = pydantic_ai.Agent(**options).run_sync(WHO[0]["content"])
    assert first.output == WHO[1]["content"]
    assert pydantic_ai.Agent(**options).run_sync("more", message_history=first.all_messages()).output
    assert isinstance(pydantic_ai.Agent(output_type=Verdict, **options).run_sync("hello").output, Verdict)


def test_smolagents(served):
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel("minimind", api_base=f"{served.url}/v1", api_key="none", temperature=0)
    parts = [{"type": "text", "text": WHO[0]["content"]}]
    assert model([{"role": "user", "content": parts}]).content == WHO[1]["content"]
    agent = smolagents.ToolCallingAgent([], model, max_steps=1, verbosity_level=0)  # every step requires a call
    agent.run(QUESTION)
    assert agent.memory.steps[1].tool_calls


def test_llm(served, tmp_path, monkeypatch):
    llm = pytest.importorskip("llm.cli")
    from click.testing import CliRunner

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([
        {"model_id": "ours", "model_name": "minimind", "api_base": f"{served.url}/v1"}]))
    for flags in ([], ["--no-stream"]):
        command = ["prompt", "-m", "ours", "--key=none", "-o", "temperature", "0", *flags, WHO[0]["content"]]
        assert CliRunner().invoke(llm.cli, command).output.strip() == WHO[1]["content"]


def test_litellm(served, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
    litellm = pytest.importorskip("litellm")
    options = {"model": "openai/minimind", "api_base": f"{served.url}/v1", "api_key": "none", "temperature": 0}
    assert litellm.completion(messages=WHO[:1], **options).choices[0].message.content == WHO[1]["content"]
    stream = litellm.completion(messages=WHO[:1], stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == WHO[1]["content"]
    claude = asyncio.run(litellm.anthropic.messages.acreate(messages=WHO[:1], max_tokens=100, **options))
    assert claude["content"][0]["text"] == WHO[1]["content"] and claude["stop_reason"] == "end_turn"


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(served, mode):
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(served.client(), mode=instructor.Mode[mode])
    answer = client.chat.completions.create(model="minimind", response_model=Verdict, max_retries=0, temperature=0,
                                            max_tokens=99, messages=[{"role": "user", "content": "hello"}])
    assert isinstance(answer, Verdict)


def test_the_page_names_tests_and_versions_that_are_there():
    page, pinned = ((ROOT / name).read_text("utf-8") for name in ("docs/clients.md", "constraints.txt"))
    for path, _, test in re.findall(r"`(tests/[\w.]+)(::(\w+))?`", page):
        assert not test or f"def {test}(" in (ROOT / path).read_text("utf-8"), test
        assert (ROOT / path).is_file(), path
    for package in ("openai", "openai-agents", "langchain-openai", "llm", "smolagents", "peft", "trl", "schemathesis"):
        version = re.search(rf"^{package}==([\d.]+)", pinned, re.M)[1]
        assert re.search(rf"^\| {package} [^|]*\| {re.escape(version)} \|", page, re.M | re.I), package
