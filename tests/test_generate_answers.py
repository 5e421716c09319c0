"""Answers of a teacher behind HTTP, asked for with the real openai SDK: kept, resumed, and good to fine-tune on."""

import json
import sys
from unittest import mock

import pytest
from lab import TOKENIZER, JsonHandler, serving

from dataset.lm_dataset import SFTDataset
from model.cli import Failure, UserError, run_main
from scripts import generate_answers
from scripts.lib.openai_client import ChatClient


class Teacher(JsonHandler):
    """Answers with the last message in capitals; `asked` keeps what it heard; from request `fails_at` on it refuses."""

    asked: list[dict] = []
    fails_at, status, arguments, suffix, finish_reason = 10**9, 401, '{"zone": "Asia/Seoul"}', "", "stop"

    def do_POST(self):
        request = self.body()
        self.asked.append(request)
        said = request["messages"][-1]["content"].upper() + self.suffix
        name = ("reasoning_content", "reasoning")[len(self.asked) % 2]  # DeepSeek's and vLLM's
        message = {"role": "assistant", "content": said, name: "hm"}
        if request.get("tools"):
            function = {"name": "clock", "arguments": self.arguments}
            message = {"role": "assistant", "content": None,
                       "tool_calls": [{"id": "1", "type": "function", "function": function}]}
        if len(self.asked) > self.fails_at:
            return self.reply(self.status, {"error": {"message": "no such key"}})
        self.complete(message, self.finish_reason)


@pytest.fixture
def teacher():
    kind = type("Teacher", (Teacher,), {"asked": []})
    with serving(kind) as kind.url:
        yield kind


@pytest.fixture
def ask(teacher, tmp_path):
    def run(rows: list[dict], **flags) -> list[dict]:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {"data_path": tmp_path / "in.jsonl", "out": tmp_path / "out.jsonl", "base_url": teacher.url, **flags}
        with mock.patch.object(sys, "argv", ["", *(f"--{name}={value}" for name, value in flags.items())]):
            run_main(generate_answers.main)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    return run


class Stranger(JsonHandler):
    """What another program answers."""

    kind, content = "text/html", b"<html>"

    def do_POST(self):
        self.send_response(200)
        for name, value in (("Content-Type", self.kind), ("Content-Length", str(len(self.content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.content)

    do_GET = do_POST


@pytest.mark.parametrize("kind, content", [
    ("text/html", b"<html>"), ("application/json", b"{nope"), ("application/json", b"[]")])
def test_a_server_of_another_kind_is_told_in_one_line(kind, content):
    with serving(type("Stranger", (Stranger,), {"kind": kind, "content": content})) as url:
        for name in ("m", ""):
            with pytest.raises(Failure, match=f"{url} does not answer as OpenAI's API does"):
                ChatClient(url, model=name).complete([{"role": "user", "content": "x"}])
        with pytest.raises(Failure, match=f"{url} does not answer as OpenAI's API does"):
            list(ChatClient(url, model="m").stream([{"role": "user", "content": "x"}]))
    for wrong, key in (("http://127.0.0.1:abc/v1", ""), (url, "密钥")):
        with pytest.raises(UserError, match=wrong):
            ChatClient(wrong, key)


def row(text: str) -> dict:
    return {"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": "无"}]}


def test_the_answers_are_rows_to_fine_tune_on(ask, tmp_path, teacher):
    rows = ask([row("one"), row("two"), row("one")])
    assert sorted(each["conversations"][0]["content"] for each in rows) == ["one", "two"]
    for each in rows:
        question, answer = each["conversations"]
        assert answer == {"role": "assistant", "content": question["content"].upper(), "reasoning_content": "hm"}
    data = SFTDataset(tmp_path / "out.jsonl", TOKENIZER, 64, cache_dir=tmp_path)
    assert data.meta["documents"] == 2 and all(len(request["messages"]) == 1 for request in teacher.asked)


def test_tools_go_and_calls_come(ask, teacher, capsys):
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
    calls = [{"name": "clock", "arguments": {"zone": f"Asia/{city}"}} for city in ("Tokyo", "Hanoi")]
    messages = [{"role": "system", "content": "", "tools": json.dumps(tools)}, {"role": "user", "content": "time?"},
                {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)},
                {"role": "tool", "content": "12:00"}, {"role": "tool", "content": "10:00"}]
    answered, = ask([{"conversations": messages}])
    sent, = teacher.asked
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "tool", "tool"]
    sent_calls = sent["messages"][1]["tool_calls"]
    assert [call["id"] for call in sent_calls] == [message["tool_call_id"] for message in sent["messages"][2:]]
    assert len({call["id"] for call in sent_calls}) == 2 and sent["tools"] == tools
    assert [json.loads(call["function"]["arguments"]) for call in sent_calls] == [call["arguments"] for call in calls]
    assert answered["conversations"][:5] == messages
    assert answered["conversations"][5]["tool_calls"] == [{"name": "clock", "arguments": {"zone": "Asia/Seoul"}}]
    teacher.arguments = "{"  # a call that nothing can be learned from
    messages[1]["content"] = "And now?"
    assert len(ask([{"conversations": messages}])) == 1
    assert "1 answers" in (said := capsys.readouterr().out) and "1 prompts have none" in said


def test_an_answer_that_fine_tuning_would_refuse_is_left_out(ask, teacher, capsys):
    teacher.suffix = '<tool_call>{"name": </tool_call>'
    assert ask([row("one")]) == []
    assert "1 prompts have none, the first because: message 2: a <tool_call> is not JSON" in capsys.readouterr().out


def test_an_answer_that_is_cut_off_is_left_out_and_asked_for_again(ask, teacher, capsys):
    teacher.finish_reason = "length"
    assert ask([row("one")]) == []
    assert "the first because: its answer is cut off at --max_new_tokens 1024" in capsys.readouterr().out
    teacher.finish_reason = "stop"
    assert len(ask([row("one")], max_new_tokens=2048)) == 1


def test_a_run_that_ended_early_goes_on_and_asks_nothing_twice(ask, teacher, tmp_path, capsys):
    rows = [row(str(number)) for number in range(9)]
    teacher.fails_at = 4
    with pytest.raises(SystemExit) as ended:
        ask(rows, concurrency=1)
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "no such key" in said and "4 answers are kept" in said and "run again" in said
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write('{"conversations": [{"role": "us')  # killed while it wrote
    teacher.fails_at, teacher.asked[:] = 10**9, []
    assert sorted(int(each["conversations"][0]["content"]) for each in ask(rows)) == list(range(9))
    assert len(teacher.asked) == 5
    ask(rows)
    assert len(teacher.asked) == 5


def test_a_refused_prompt_is_counted_and_left_out(ask, teacher, capsys):
    teacher.fails_at, teacher.status = 1, 400
    assert len(ask([row("a"), row("b")], concurrency=1)) == 1
    assert "1 prompts have none" in capsys.readouterr().out


@pytest.mark.parametrize("rows, flags, words", [
    ([row("a"), {"conversations": []}], {}, ["in.jsonl:2:", "one message or more"]),
    ([{"conversations": [{"role": "assistant", "content": "a"}]}], {}, ["in.jsonl:1:", "no message before"]),
    ([row("a")], {"concurrency": 0}, ["--concurrency"]),
])
def test_mistakes_are_told_in_one_line_and_nothing_is_asked(ask, teacher, capsys, rows, flags, words):
    with pytest.raises(SystemExit) as ended:
        ask(rows, **flags)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and all(word in said[0] for word in words) and not teacher.asked


def test_a_file_of_something_else_is_not_touched(ask, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text('{"text": "precious"}\n')
    with pytest.raises(SystemExit):
        ask([row("a")])
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == '{"text": "precious"}\n'
