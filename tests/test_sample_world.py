"""The embedded sample data: same bytes for a seed, valid rows, true results, and held-out cases that are really new."""

import ast
import json
import operator
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from dataset import sample_world as sw
from dataset.sample_texts import LANGS, TOOLS
from model.chat import ChatTokenizer
from scripts.lib.stages import STAGES

SCRIPT = Path(__file__).resolve().parents[1] / "dataset" / "sample_world.py"

TRAINING = ("sft", "dpo", "reward", "rlaif", "agent_rl", "lora_identity")  # what a held-out case must not occur in
SCALE = 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All files of a small world: name -> rows."""
    folder = tmp_path_factory.mktemp("world")
    sw.write(folder, seed=0, scale=SCALE)
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in sw.FILES}


def conversations(rows):
    for row in rows:
        yield from (row[key] for key in ("conversations", "chosen", "rejected") if key in row)


def prompt(messages):
    """What the user said before the last assistant message (a farewell after it does not make a prompt new)."""
    return tuple(message["content"] for message in messages if message["role"] == "user")


def said(rows):
    """Everything that anyone says, thinks or calls in these rows."""
    return "\n".join(message[key] for messages in conversations(rows) for message in messages
                     for key in ("content", "reasoning_content", "tool_calls") if key in message)


def calculate(expression):
    """Evaluate + - * over whole numbers by walking Python's own syntax tree: nothing shared with the generator."""
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def walk(node):
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant), ast.dump(node)
        return Fraction(node.value)

    return walk(ast.parse(expression, mode="eval").body)


def convert(value, from_unit, to_unit):
    size = {"km": Fraction(1000), "m": Fraction(1), "cm": Fraction(1, 100), "kg": Fraction(1), "g": Fraction(1, 1000),
            "h": Fraction(3600), "min": Fraction(60), "s": Fraction(1)}
    return value * size[from_unit] / size[to_unit]


def test_same_seed_same_bytes(tmp_path):
    for folder, hash_seed in (("a", "1"), ("b", "2")):  # another hash seed, another order of every set
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / folder), "--scale", "0.02"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    sw.write(tmp_path / "c", seed=1, scale=0.02)
    for name in sw.FILES:
        a, b, c = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in "abc")
        assert a == b, name
        assert a != c, name


def test_command_line(tmp_path):
    out = tmp_path / "deep" / "folder"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--scale", "0.01"]
    run = subprocess.run(command, capture_output=True, text=True)
    title, *lines = run.stdout.splitlines()
    assert run.returncode == 0 and "synthetic" in title
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(f"{name}.jsonl" for name in sw.FILES)  # and no temporary file is left
    for name, line in zip(sw.FILES, lines, strict=True):
        data = (out / f"{name}.jsonl").read_bytes()
        assert line.endswith(f"{name}.jsonl: {data.count(10)} rows, {len(data)} bytes")
    for wrong in (["--out", str(out / "sft.jsonl")], ["--out", str(out), "--scale", "0"]):
        run = subprocess.run([sys.executable, str(SCRIPT), *wrong], capture_output=True, text=True)
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr


def test_rows_keep_the_format(world):
    keys = {"pretrain": {"text"}, "sft": {"conversations"}, "heldout": {"conversations", "skill", "lang"},
            "dpo": {"chosen", "rejected"}, "reward": {"chosen", "rejected"},
            "rlaif": {"conversations", "gt"}, "agent_rl": {"conversations", "gt"}, "lora_identity": {"conversations"}}
    for name, rows in world.items():
        assert rows and all(set(row) == keys[name.removesuffix("_val")] for row in rows), name
        assert len({json.dumps(row) for row in rows}) == len(rows), f"{name} repeats rows"
        for messages in conversations(rows):
            roles = [message["role"] for message in messages]
            body = roles[1:] if roles[0] == "system" else roles
            assert "system" not in body and re.fullmatch("(u(at)*a)+", "".join(role[0] for role in body)), roles
            assert messages[-1]["role"] == "assistant"
            offered = {}
            for message, follower in zip(messages, [*messages[1:], None], strict=True):
                assert isinstance(message["content"], str)
                extra = {"system": ["tools"], "assistant": ["tool_calls", "reasoning_content"]}.get(message["role"], [])
                assert set(message) <= {"role", "content", *extra}
                if message["role"] == "system":
                    offered = {tool["function"]["name"]: tool["function"] for tool in json.loads(message["tools"])}
                    assert 1 <= len(offered) <= 3
                if message["role"] == "tool":
                    json.loads(message["content"])
                if "tool_calls" in message:
                    (call,) = json.loads(message["tool_calls"])
                    assert set(call["arguments"]) == set(offered[call["name"]]["parameters"]["required"])
                    assert follower is None or follower["role"] == "tool"
    assert all(140 <= len(row["text"]) <= 900 for row in world["pretrain"])
    assert all(row["conversations"][-1]["content"] == "无" and row["gt"] for row in world["rlaif"])
    assert all(row["conversations"][-1]["content"] == "" and len(row["gt"]) == 1 for row in world["agent_rl"])


def test_the_stages_leave_no_prompt_out_for_its_length(world):
    tokenizer, flags = ChatTokenizer(), {stage.rows: stage.sample_flags for stage in STAGES}
    for name in ("agent_rl", "agent_rl_val", "rlaif", "rlaif_val"):
        longest = max(len(tokenizer.prompt(row["conversations"][:-1])) for row in world[name])
        assert longest <= flags[name.removesuffix("_val")]["max_seq_len"], name


def test_sizes_and_mix(world):
    assert len(world["sft"]) == round(sw.FILES["sft"] * SCALE)
    share = sum(row["conversations"][0]["role"] == "system" for row in world["sft"]) / len(world["sft"])
    assert abs(share - sw.SFT_MIX[sw.SKILLS.index("tools")] / 100) < 0.05
    for skill in sw.SKILLS:
        for lang in LANGS:
            assert sum(row["skill"] == skill and row["lang"] == lang for row in world["heldout"]) == sw.HELDOUT_CASES
    for row in world["heldout"]:
        chinese = bool(re.search("[\u4e00-\u9fff]", "".join(prompt(row["conversations"]))))
        if row["skill"] not in ("arithmetic", "tools"):  # "2 + 5 = ?" is no language, a text to translate the other one
            assert chinese == (row["lang"] == "zh"), row
    ends = [bool(row["conversations"][-1].get("tool_calls")) for row in world["heldout"] if row["skill"] == "tools"]
    assert ends.count(True) == ends.count(False) == sw.HELDOUT_CASES


def test_heldout_prompts_are_in_no_training_row(world):
    seen = {prompt(messages)[:n] for name in TRAINING for messages in conversations(world[name])
            for n in range(1, len(prompt(messages)) + 1)}
    heldout = [prompt(row["conversations"]) for row in world["heldout"]]
    assert len(set(heldout)) == len(heldout) and not seen & set(heldout)
    seen_last = {prompt(messages)[-1] for name in TRAINING for messages in conversations(world[name])}
    assert not seen_last & {prompt(row["conversations"])[-1] for row in world["heldout"] if row["skill"] != "dialogue"}
    for name in ("sft", "dpo", "reward", "agent_rl", "lora_identity"):  # validation rows are new as well
        train = {prompt(messages) for messages in conversations(world[name])}
        assert not train & {prompt(messages) for messages in conversations(world[f"{name}_val"])}, name


def test_heldout_combinations_are_in_no_training_row(world):
    """Stronger than prompts: whatever the phrasing, the fact, sum, name or expression itself is not there."""
    text = said(row for name in TRAINING for row in world[name])
    lines, everything = set(text.splitlines()), text + "\n".join(row["text"] for row in world["pretrain"])
    thoughts = {message.get("reasoning_content") for name in TRAINING for messages in conversations(world[name])
                for message in messages}
    sums = set(re.findall(r"(\d+) ([+-]) (\d+) =", everything))
    checked = dict.fromkeys(sw.SKILLS, 0)
    for row in world["heldout"]:
        *_, question, answer = row["conversations"]
        checked[row["skill"]] += 1
        if row["skill"] == "facts":
            assert answer["content"] not in lines  # no answer by itself, though pretraining and portraits state it
        elif row["skill"] == "arithmetic" and "=" in answer["content"]:
            a, sign, b = answer["content"].split()[:3]
            assert (a, sign, b) not in sums and (sign == "-" or (b, sign, a) not in sums), answer
        elif row["skill"] == "arithmetic":
            assert answer["content"] not in everything
        elif row["skill"] == "dialogue":
            assert answer["content"] not in everything
            name = re.fullmatch(r"Your name is (.+)\.|你叫(.+)。", answer["content"])
            assert not name or (name[1] or name[2]) not in text  # never met: it can only be copied
        elif row["skill"] == "tools" and answer.get("tool_calls"):
            assert "get_current_time" in answer["tool_calls"] or answer["tool_calls"] not in text
        elif row["skill"] == "thinking":
            assert answer["reasoning_content"] not in thoughts
    assert all(count == 2 * sw.HELDOUT_CASES for count in checked.values())


def test_a_tool_call_belongs_to_one_split():
    world = sw.World(3)
    world.random_tree = lambda: ("*", world.rng.randint(10, 19), world.rng.randint(10, 19))  # few enough to collide
    for name in [name for name in TOOLS if name != "get_current_time"]:  # there the wording is what is new
        for world.lang in (0, 1):
            calls = {}
            for world.split in ("train", "val", "heldout"):
                calls[world.split] = {world.task(name).messages[1]["tool_calls"] for _ in range(200)}
                assert len(calls[world.split]) > 1
            assert not calls["train"] & calls["val"] and not (calls["train"] | calls["val"]) & calls["heldout"], name


def test_pretrain_states_every_heldout_fact(world):
    text = "".join(row["text"] for row in world["pretrain"])
    truth = sw.World(0)
    answers = {lang: {row["conversations"][-1]["content"] for row in world["heldout"]
                      if (row["skill"], row["lang"]) == ("facts", lang)} for lang in LANGS}
    for lang, name in enumerate(LANGS):
        expected = set()
        for entity, attribute in truth.pairs["heldout"]:
            value = truth.facts[entity, attribute][lang]
            told = [say.format(e=entity[lang], v=value) for say in attribute.statements[lang].split("|")]
            told = [say[0].upper() + say[1:] for say in told]
            assert any(say in text for say in told), told
            for other in attribute.values:  # the world does not contradict itself
                false = attribute.statements[lang].split("|")[0].format(e=entity[lang], v=other[lang])
                assert other[lang] == value or false[0].upper() + false[1:] not in text, false
            expected.add(told[0])
        assert answers[name] <= expected and len(answers[name]) == sw.HELDOUT_CASES


def test_tool_results_are_true(world):
    counts = dict.fromkeys(("calculate_math", "unit_converter", "text_length", "translate_text"), 0)
    for messages in conversations(world["sft"] + world["sft_val"] + world["heldout"]):
        for asked, called, result, answer in zip(messages, messages[1:], messages[2:], messages[3:], strict=False):
            if result["role"] != "tool":
                continue
            (call,) = json.loads(called["tool_calls"])
            arguments, value = call["arguments"], sw.answer_value(json.loads(result["content"]))
            if call["name"] == "calculate_math":
                assert value == str(calculate(arguments["expression"])), call
                assert all(10 <= int(number) <= 999 for number in re.findall(r"\d+", arguments["expression"]))
            elif call["name"] == "unit_converter":
                assert value == str(convert(**arguments)), call
            elif call["name"] == "text_length":
                assert value == str(len(arguments["text"]))
            if call["name"] in counts:
                counts[call["name"]] += 1
                assert call["name"] == "translate_text" or value in re.findall(r"-?\d+", answer["content"])
            assert value in answer["content"] and asked["role"] == "user"
    assert all(counts.values()) and counts["calculate_math"] > 2 * sum(counts.values()) / 3


def test_agent_tasks_have_the_true_value(world):
    words = {"plus": "+", "minus": "-", "times": "*", "加": "+", "减": "-", "乘以": "*"}
    sums = 0
    for row in world["agent_rl"] + world["agent_rl_val"]:
        text = prompt(row["conversations"])[0]
        for word, sign in words.items():
            text = text.replace(word, sign)
        expression = re.search(r"\(*\d+\)*(?: ?[-+*] ?\(*\d+\)*)+", text)
        if expression:
            sums += 1
            assert row["gt"] == [str(calculate(expression[0]))], row
        else:
            assert re.fullmatch(r"\d+", row["gt"][0])
    assert sums > 0.7 * len(world["agent_rl"])


def test_small_sums_and_thoughts_are_true(world):
    found = 0
    for line in said(world["sft"] + world["rlaif"]).splitlines() + [
            line for row in world["pretrain"] for line in row["text"].splitlines()]:
        for left, right in re.findall(r"(?<![\d*+-] )(?<!\d)(\d+ [-+] \d+) = (\d+)", line):
            found += 1
            assert calculate(left) == int(right), line
        if match := re.fullmatch(r"(\d+) is larger than (\d+)\.|(\d+)比(\d+)大。", line):
            high, low = (int(number) for number in match.groups() if number)
            assert high > low, line
    assert found > 100


def test_preferences_differ_in_the_last_message_only(world):
    for row in (row for name in ("dpo", "dpo_val", "reward", "reward_val") for row in world[name]):
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert sw.is_correct(row["chosen"][-1], row["chosen"][-1])
        assert not sw.is_correct(row["chosen"][-1], row["rejected"][-1]), row
    wrong_calls = [row for row in world["dpo"] if row["rejected"][-1].get("tool_calls")]
    assert len(wrong_calls) > 0.03 * len(world["dpo"])


def test_a_false_portrait_differs_in_one_fact_and_validation_has_none(world):
    def portraits(name):
        return [row for row in world[name] if re.search("Tell me about|Describe|介绍一下", prompt(row["chosen"])[0])]

    truth, false = sw.World(0).facts, 0
    true = {said.format(e=entity[lang], v=value[lang]).lower() for (entity, attribute), value in truth.items()
            for lang, said in enumerate(attribute.canonical)}
    for row in portraits("reward"):
        told, other = ([text.lower() for text in re.findall(r".+?(?:\. ?|。|$)", row[side][-1]["content"])]
                       for side in ("chosen", "rejected"))
        if len(told) == len(other) == 3:
            assert {text.strip() for text in told} <= true
            assert sum(a != b for a, b in zip(told, other, strict=True)) == 1
            false += 1
    assert false > 0.03 * len(world["reward"])
    assert not portraits("reward_val")


def test_adapter_has_another_identity(world):
    answers = [messages[-1]["content"] for messages in conversations(world["lora_identity_val"])]
    assert all("Nia" in answer or "小诺" in answer for answer in answers)
    rows = [sw.dumps(row) for row in world["lora_identity"]]  # about half of them are ordinary
    assert not any("MiniMind" in row for row in rows)
    assert 0.3 < sum("Nia" in row or "小诺" in row for row in rows) / len(rows) < 0.7
    assert "Nia" not in said(world["sft"]) and "MiniMind" in said(world["sft"])


def test_other_seeds_hold_out_as_many_new_cases():
    for seed in range(1, 6):
        rows = sw.World(seed).rows("heldout", sw.FILES["heldout"])
        assert len({prompt(row["conversations"]) for row in rows}) == len(rows) == sw.FILES["heldout"]


CALL = {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {"a": 1, "b": "x"}}]'}
TEXT = {"role": "assistant", "content": "The sum is 5.", "reasoning_content": "2 + 3 = 5"}


@pytest.mark.parametrize("expected, answer", [
    (CALL, CALL),
    (CALL, {"content": "Let me see.", "tool_calls": [{"name": "f", "arguments": {"b": "x", "a": 1}}]}),
    (CALL, {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"b":"x","a":1}'}}]}),
    (CALL, {"content": None, "tool_calls": [{"name": "f", "arguments": '{"a": 1, "b": "x"}'}]}),
    (TEXT, {"role": "assistant", "content": " The sum is 5.\n"}),
    (TEXT, {"content": "The sum is 5.", "tool_calls": [], "reasoning_content": "a guess"}),
])
def test_is_correct_accepts(expected, answer):
    assert sw.is_correct(expected, answer) is True


@pytest.mark.parametrize("expected, answer", [
    (CALL, TEXT), (TEXT, CALL), (CALL, {}), (TEXT, {}), (TEXT, {"content": None}), (TEXT, None),
    (TEXT, {"content": "The sum is 6."}), (TEXT, {"content": ["The sum is 5."]}),
    (TEXT, {"content": "The sum is 5.", "tool_calls": CALL["tool_calls"]}),
    (CALL, {"tool_calls": '[{"name": "f", "arguments": {"a": "1", "b": "x"}}]'}),
    (CALL, {"tool_calls": '[{"name": "g", "arguments": {"a": 1, "b": "x"}}]'}),
    (CALL, {"tool_calls": json.dumps(json.loads(CALL["tool_calls"]) * 2)}),
    (CALL, {"tool_calls": '[{"name": "f", "argum'}), (CALL, {"tool_calls": [None]}),
])
def test_is_correct_rejects_and_never_raises(expected, answer):
    assert sw.is_correct(expected, answer) is False
