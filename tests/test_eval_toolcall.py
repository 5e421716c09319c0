"""eval_toolcall.py: what is asked and what counts, on models that recite, in this process and behind a server."""

import builtins
import json
import random
import sys
from math import sqrt
from statistics import NormalDist

import lab
import pytest
from lab import TOKENIZER, JsonHandler, small_model
from reciter import Reciter
from test_episodes import calls, returns, says, user
from test_server import serving

import eval_toolcall
from dataset import sample_world
from dataset.prompts import Prompt
from eval_toolcall import ToolChat, wilson_interval
from model.chat import CALL, END_THINK
from model.cli import run_main
from model.weights import ROOT, save_weight
from scripts.lib.tool_cases import held_out_tasks, is_accepted, read_cases
from trainer.rl.tools import SCHEMAS, call_tool


def prompt_of(messages: list[dict], gt: tuple | list = ()) -> Prompt:
    return Prompt(TOKENIZER.prompt(messages), messages, False, list(gt))


def answered(case) -> list[int]:
    """The ids of a case that is answered rightly."""
    (name, accepted), = case.accepted.items()
    arguments = {key: values[0] for key, values in accepted.items()}
    said = [calls((name, arguments)), *returns(call_tool(name, arguments, seed=42)),
            says(f"So: {case.prompt.ground_truth[0]}")]
    said[1]["content"] = json.dumps(call_tool(name, arguments, seed=42), ensure_ascii=False)
    return TOKENIZER.encode([*case.prompt.messages, *said])[0]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program with flags, on `models` by name, with `lines` typed if any; → what it prints."""

    def run(*flags: str, models: dict | None = None, lines: tuple = ()) -> str:
        device = [] if "--backend=api" in flags else ["--device=cpu"]
        monkeypatch.setattr(sys, "argv", ["eval_toolcall.py", *device, *flags])
        if models is not None:
            monkeypatch.setattr(eval_toolcall, "load_from_args", lambda args, weight: (models[weight], TOKENIZER))
        typed = iter(lines)
        monkeypatch.setattr(builtins, "input", lambda _: next(typed, "/exit"))
        run_main(eval_toolcall.main)
        return capsys.readouterr().out

    return run


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_tasks_are_held_out_new_and_the_same_for_a_seed():
    cases = held_out_tasks(60, 1, prompt_of)
    assert cases == held_out_tasks(60, 1, prompt_of) != held_out_tasks(60, 2, prompt_of)
    assert [case.kind for case in cases] == ["math"] * 60 + ["mixed"] * 60
    assert len({case.prompt.messages[-1]["content"] for case in cases}) == 120
    trained, world = set(), sample_world.World()
    for row in world.rows("agent_rl", 1500) + world.rows("sft", 1500):
        for message in row["conversations"]:
            trained |= {call["arguments"].get("expression") for call in json.loads(message.get("tool_calls", "[]"))}
    assert len(trained) > 200 and not trained & {case.shown for case in cases}
    assert {next(iter(case.accepted)) for case in cases[60:]} == set(SCHEMAS) - {"calculate_math"}
    for case in cases[:60]:
        assert case.prompt.ground_truth == [str(eval(case.shown))]


def test_more_tasks_than_there_are_new_ones_come_to_an_end():
    assert len(held_out_tasks(700, 0, prompt_of)) == 1400


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right, of", [(0, 20), (1, 20), (12, 20), (17, 20), (20, 20), (171, 200), (1, 1)])
def test_the_interval_ends_where_the_score_test_does(right, of):
    """At either end p, the share lies 1.96 standard deviations sqrt(p (1 - p) / n) away from p: Wilson's definition."""
    low, high = wilson_interval(right, of)
    assert 0 <= low <= right / of <= high <= 1 and low < high
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(right / of - end) == pytest.approx(NormalDist().inv_cdf(0.975) * sqrt(end * (1 - end) / of))


def test_a_benchmark_counts_right_answers_of_several_weights_on_the_same_cases(run, tmp_path):
    cases = held_out_tasks(8, 42, prompt_of)
    good, half = Reciter([answered(case) for case in cases]), Reciter([answered(case) for case in cases[:4]])
    out = run("--benchmark=8", "--weight", "half", "good", f"--json={tmp_path / 'x.json'}",
              models={"good": good, "half": half})
    lines = out.splitlines()
    assert len(lines) == 2 * 16 + 4 and [line[0] for line in lines[:16]] == ["✅"] * 4 + ["❌"] * 12
    result = cases[0].prompt.ground_truth[0]
    assert lines[0] == f"✅ math: {cases[0].shown}  gt {result}  prediction {result}"
    assert lines[-4:] == ["half math: 4/8 = 50.0% [21.5%, 78.5%]", "half mixed: 0/8 = 0.0% [0.0%, 32.4%]",
                          "good math: 8/8 = 100.0% [67.6%, 100.0%]", "good mixed: 8/8 = 100.0% [67.6%, 100.0%]"]
    saved = json.loads((tmp_path / "x.json").read_text("utf-8"))
    assert saved["seed"] == 42 and saved["weights"]["good"]["mixed"]["right_calls"] == 8
    assert saved["weights"]["half"]["math"]["right"] == 4 == saved["weights"]["half"]["math"]["right_calls"]
    assert [case["asked"] for case in saved["weights"]["good"]["math"]["cases"]] == [case.shown for case in cases[:8]]


def test_rows_of_agent_rl_are_cases(run, tmp_path):
    world = sample_world.World()
    rows = world.rows("agent_rl_val", 4)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    texts = [TOKENIZER.encode([*row["conversations"][:-1], says(f"= {row['gt'][0]}")])[0] for row in rows[:3]]
    assert "full_sft rows: 3/4" in run(f"--cases={path}", models={"full_sft": Reciter(texts)})


def test_of_a_question_that_cannot_be_answered_to_its_end_nothing_stays():
    chat = object.__new__(ToolChat)
    first = [{"role": "system", "content": ""}, user("1 + 1?"), says("2")]
    chat.messages = [*first, user("2 + 2?"), says("a call"), {"role": "tool", "content": "4"}]
    chat.drop_question()
    assert chat.messages == first


DICE = {"name": "random_number", "parameters": {"type": "object", "required": ["min", "max"], "properties": {
    "min": {"const": 7}, "max": {"const": 7}}}}


def test_calls_are_kept_valid_where_they_are_constrained(run, tmp_path):
    """The model begins a call and ends it at once; the grammar leaves it a single call to finish."""
    offer, thinking = {"role": "system", "content": "", "tools": [DICE]}, ("--open_thinking=1",)
    rows, turns = tmp_path / "rows.jsonl", []
    rows.write_text(json.dumps({"conversations": [offer, user("A number?"), says("")], "gt": ["7"]}), "utf-8")
    thought = TOKENIZER.encode_text("hm") + [END_THINK, *TOKENIZER.encode_text("\n\n"), CALL]
    for flags, answer in ((), [CALL]), (thinking, thought):
        model = Reciter([TOKENIZER.prompt([offer, user("A number?")], open_thinking=bool(flags)) + answer])
        for constrained in ("0", "1"):
            run(f"--cases={rows}", f"--json={tmp_path / 'x.json'}", f"--constrained={constrained}", *flags,
                models={"full_sft": model})
            saved = json.loads((tmp_path / "x.json").read_text("utf-8"))
            assert saved["constrained"] == int(constrained)
            turns += saved["weights"]["full_sft"]["rows"]["cases"][0]["turns"][:1]
    assert [turn["tool_calls"] for turn in turns] == [
        [], [{"name": "random_number", "arguments": {"min": 7, "max": 7}}]] * 2
    assert [turn["reasoning"] for turn in turns] == ["", "", "hm", "hm"]
    row = TOKENIZER.prompt([OFFER, user("1 + 2?")]) + [CALL]
    assert '{"name": "c' in run("--constrained=1", "--tools", "calculate_math", "--prompt=1 + 2?",
                                  "--max_new_tokens=9", models={"full_sft": Reciter([row])})
    rows.write_text(json.dumps({"conversations": [offer | {"tools": [{"name": "f", "parameters": {"type": "x"}}]},
                                                  user("?"), says("")]}), "utf-8")
    with pytest.raises(SystemExit, match="2"):
        run(f"--cases={rows}", "--constrained=1", models={"full_sft": model})


ACCEPTED = {"area": {"base": [10], "unit": ["units", ""], "names": [["A b"]],
                     "deep": [{"x": [1, 2], "y": ["", 3]}, ""]}}


@pytest.mark.parametrize("name, arguments, right", [
    ("area", {"base": 10, "names": ["a-B"]}, True), ("area", {"base": 10.0, "unit": "Units", "names": ["ab"]}, True),
    ("area", {"base": 10, "names": ["ab"], "deep": {"x": 2}}, True),
    ("area", {"base": 10, "names": ["ab"], "deep": {"x": 3}}, False),
    ("Area", {"base": 10, "names": ["ab"]}, False), ("area", {"base": 10}, False), ("area", {"names": ["ab"]}, False),
    ("area", {"base": "10", "names": ["ab"]}, False), ("area", {"base": 10, "names": ["ab"], "more": 1}, False),
    ("area", {"base": True, "names": ["ab"]}, False), ("area", {"base": 10, "names": ["ab", "c"]}, False),
    ("area", {"base": 10, "unit": "metres", "names": ["ab"]}, False)])
def test_a_call_is_accepted_by_name_and_arguments(name, arguments, right):
    assert is_accepted({"name": name, "arguments": arguments}, ACCEPTED) == right


def bfcl_rows() -> tuple[list[dict], list[dict]]:
    function = {"name": "math.area", "description": "Area", "parameters": {"type": "dict", "properties": {
        "base": {"type": "float"}, "unit": {"type": "string"}}, "required": ["base"]}}
    rows = [{"id": f"n{i}", "question": [[user(f"Area {i}?")]], "function": [function]} for i in range(3)]
    return rows, [{"id": row["id"], "ground_truth": [{"math.area": {"base": [i], "unit": ["", "m"]}}]}
                  for i, row in enumerate(rows)]


def write_bfcl(folder):
    for name, rows in zip(("simple", "simple_answers"), bfcl_rows(), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "simple.jsonl"


def test_rows_of_the_leaderboard_are_scored_by_the_call(run, tmp_path):
    path = write_bfcl(tmp_path)
    cases = read_cases(path, TOKENIZER, prompt_of, 2048)
    properties = cases[0].prompt.tools[0]["function"]["parameters"]
    assert properties["type"] == "object" and properties["properties"]["base"] == {"type": "number"}
    texts = [TOKENIZER.encode([*cases[0].prompt.messages, calls(("math.area", {"base": 0}))])[0],
             TOKENIZER.encode([*cases[1].prompt.messages, calls(("math.area", {"base": 7}))])[0]]
    out = run(f"--cases={path}", models={"full_sft": Reciter(texts)})
    assert [line[0] for line in out.splitlines()[:3]] == ["✅", "❌", "❌"] and "full_sft simple: 1/3" in out
    (tmp_path / "simple_answers.jsonl").unlink()
    with pytest.raises(SystemExit, match="2"):
        run(f"--cases={path}", models={"full_sft": Reciter([])})


@pytest.mark.skipif(not (ROOT.parent / "shared/data/eval/bfcl_simple.jsonl").is_file(), reason="the data is not here")
def test_the_real_leaderboard_rows_are_read():
    cases = read_cases(ROOT.parent / "shared/data/eval/bfcl_simple.jsonl", TOKENIZER, prompt_of, 2048)
    assert len(cases) == 400
    dice = random.Random(0)
    for case in dice.sample(cases, 100):  # each accepted call is accepted, and no other
        (name, accepted), = case.accepted.items()
        right = {key: dice.choice(values) for key, values in accepted.items() if "" not in values}
        right = {key: {k: v[0] for k, v in value.items()} if isinstance(value, dict) else value
                 for key, value in right.items()}
        assert is_accepted({"name": name, "arguments": right}, case.accepted) or "[{" in json.dumps(right)
        assert not is_accepted({"name": name, "arguments": right | {"nothing": 1}}, case.accepted)


# -- conversations and servers -----------------------------------------------------------------------------------------

OFFER = {"role": "system", "content": "", "tools": [SCHEMAS["calculate_math"]]}
TALK = [user("1 + 2?"), calls(("calculate_math", {"expression": "1 + 2"})), *returns({"result": "3"}), says("It is 3."),
        user("Thanks"), says("Welcome.")]
KNOWN = TOKENIZER.encode([OFFER, *TALK])[0]


def test_a_conversation_shows_calls_and_results(run):
    lines = ["1 + 2?", "Thanks", "/clear", "Hm"]
    out = run("--tools", "calculate_math", models={"full_sft": Reciter([KNOWN])}, lines=lines)
    shown = [line for line in out.splitlines() if line]
    assert shown[1:] == ["[tool_call] {'name': 'calculate_math', 'arguments': {'expression': '1 + 2'}}",
                         '[calculate_math → {"result": "3"}]', "It is 3.", "Welcome."]
    assert "It is 3." in run("--tools", "calculate_math", "--prompt=1 + 2?", models={"full_sft": Reciter([KNOWN])})


def test_the_calls_of_a_turn_that_was_cut_off_are_not_run(run):
    out = run("--tools", "calculate_math", "--prompt=1 + 2?", "--max_new_tokens=12",
              models={"full_sft": Reciter([KNOWN])})
    assert "[malformed]" in out and "→" not in out


@pytest.fixture(scope="module")
def served():
    cases = held_out_tasks(3, 42, lambda messages, gt=(): prompt_of(
        [{"role": "system", "content": "", "tools": json.loads(messages[0]["tools"])}, *messages[1:]], gt))
    model = Reciter([KNOWN, *map(answered, cases[:4])])
    with serving(model) as served:
        yield served


def test_a_server_can_be_counted_and_talked_to(served, run, capsys):
    api = ("--backend=api", f"--api_base_url={served.url}/v1")
    out = run(*api, "--benchmark=3")
    assert "minimind math: 3/3" in out and "minimind mixed: 1/3" in out
    said = run(*api, "--tools", "calculate_math", "--prompt=1 + 2?")
    assert said.split("\n", 1)[1] == '[calculate_math {"expression": "1 + 2"} → {"result": "3"}]\nIt is 3.\n'


class Clumsy(JsonHandler):
    """Calls a tool with arguments that are no JSON, then thinks and answers; `requests` keeps what it was sent."""

    requests: list[dict] = []

    def do_POST(self):
        self.requests.append(self.body())
        broken = {"id": "a", "type": "function", "function": {"name": "calculate_math", "arguments": "1 + 2"}}
        self.complete({"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [broken]}  # as vLLM
                      if len(self.requests) % 2 else {"role": "assistant", "content": "3"})


def test_a_server_whose_call_cannot_be_read_is_told_so_and_goes_on(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"conversations": [OFFER, user("1 + 2?"), says("")], "gt": ["3"]}) + "\n")
    with lab.serving(Clumsy) as url:
        api = ("--backend=api", f"--api_base_url={url}")
        assert "minimind rows: 1/1" in run(*api, f"--cases={rows}", f"--json={tmp_path / 'x.json'}")
        run(*api, f"--cases={rows}", "--constrained=1")
        assert Clumsy.requests[2]["tools"][0]["function"] == OFFER["tools"][0]["function"] | {"strict": True}
    _, call, result = Clumsy.requests[1]["messages"]  # the offer goes as tools
    assert Clumsy.requests[1]["tools"] == OFFER["tools"] and call["reasoning_content"] == "Hm."
    assert call["tool_calls"][0]["function"] == {"name": "calculate_math", "arguments": "1 + 2"}
    assert result["tool_call_id"] == call["tool_calls"][0]["id"] and "error" in json.loads(result["content"])
    case, = json.loads((tmp_path / "x.json").read_text("utf-8"))["weights"]["minimind"]["rows"]["cases"]
    assert case["turns"][0]["malformed"] == ["1 + 2"] and not case["right_call"]


class Limited(JsonHandler):
    """Refuses what has grown too long; calls a tool that is not on offer and answers with what it is told."""

    requests: list[dict] = []

    def do_POST(self):
        self.requests.append(body := self.body())
        question, last = body["messages"][0]["content"], body["messages"][-1]
        if "long" in question:
            return self.reply(400, {"error": {"message": "too long", "type": "invalid_request_error"}})
        call = {"id": "a", "type": "function", "function": {"name": "text_length", "arguments": '{"text": "abc"}'}}
        return self.complete({"role": "assistant", "content": None, "tool_calls": [call]} if last["role"] == "user"
                             else {"role": "assistant", "content": "3"})


def test_a_refused_request_ends_its_episode_alone(run, tmp_path, capsys):
    def write(*questions: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"conversations": [OFFER, user(question), says("")], "gt": ["3"]}) + "\n"
                                for question in questions))
        return f"--cases={path}"

    with lab.serving(Limited) as url:
        api = ("--backend=api", f"--api_base_url={url}", "--prompt=x")
        run_main(lambda: print(run(*api, write("1 + 2?", "long"))))
        printed = capsys.readouterr()
        assert "minimind rows: 1/2" in printed.out and "prediction none (refused)" in printed.out
        with pytest.raises(SystemExit, match="2"):  # no request is accepted: nothing was measured
            run(*api, write("long", "long"))
        assert "too long" in capsys.readouterr().err
    assert "text_length" in SCHEMAS  # and not on offer
    assert "unknown tool 'text_length'; offered: calculate_math" in next(
        body["messages"][-1]["content"] for body in Limited.requests if body["messages"][-1]["role"] == "tool")


def test_a_row_that_is_no_case_is_told_with_the_flags_of_this_program(run, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"conversations": []}\n')
    with pytest.raises(SystemExit, match="2"):
        run(f"--cases={tmp_path / 'rows.jsonl'}", models={"full_sft": Reciter([KNOWN])})
    said = capsys.readouterr().err
    assert "rows.jsonl:1:" in said and "skip_bad_rows" not in said
    with pytest.raises(SystemExit, match="2"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": [user("x"), says("")], "gt": ["3"]}) + "\n")
        run(f"--cases={tmp_path / 'rows.jsonl'}", "--max_total_len=3", models={"full_sft": Reciter([KNOWN])})
    assert "too long for --max_total_len 3" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--weight", "a", "b"], "--benchmark"), (["--benchmark=0"], "0"), (["--weight", "nothing"], "nothing_*.pth"),
    (["--backend=api", "--api_base_url=http://127.0.0.1:9/v1", "--benchmark=1"], "no server"),
    (["--backend=api", "--api_base_url=http://127.0.0.1:9/v1", "--prompt=a"], "no server"),
    (["--cases=/nowhere.jsonl"], "/nowhere.jsonl"), (["--tools", "hammer"], "hammer")])
def test_mistakes_are_told_in_one_line(run, flags, said, tmp_path, capsys):
    save_weight(small_model(), "full_sft", tmp_path, TOKENIZER)
    with pytest.raises(SystemExit, match="2"):
        run(*[] if "--backend=api" in flags else [f"--save_dir={tmp_path}"], *flags)
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1, error
