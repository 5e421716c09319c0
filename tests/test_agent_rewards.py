"""Rewards of episodes with tools: what is right earns most, and what was tried to earn it otherwise does not."""

import json

import pytest
from lab import TOKENIZER
from reciter import Reciter
from test_episodes import OFFER, PRODUCT, SUM, calls, returns, says, user

from dataset.prompts import Prompt, PromptDataset
from model.chat import END_CALL, END_THINK, EOS
from model.inference.engine import Engine, SamplingParams
from trainer.rl.agent_rewards import AGENT_REWARD_MIX, AGENT_REWARDS, find_unrewarded
from trainer.rl.episodes import run_episodes

MIX = {name: float(weight) for name, weight in (part.split("=") for part in AGENT_REWARD_MIX.split(","))}
QUESTION = [OFFER, user("What is 1 + 2?")]
ONCE = [calls(SUM), *returns({"result": "3"})]


def scores(*talk: dict, raw: list[int] | None = None, gt: tuple = ("3",), thinking: bool = False,
           max_turns: int = 4) -> dict[str, float]:
    """Let the episode happen: `talk` after the question, or `raw` ids at its end. → each component"""
    row = TOKENIZER.encode([*QUESTION, *talk])[0] if talk else []
    if raw is not None:
        row = (TOKENIZER.prompt([*QUESTION, *talk], open_thinking=thinking)) + raw
    prompt = Prompt(TOKENIZER.prompt(QUESTION, open_thinking=thinking), QUESTION, thinking, list(gt))
    engine = Engine(Reciter([row]), max_batch=1)
    episode, = run_episodes(engine, [prompt], [SamplingParams(300, temperature=0)], TOKENIZER, max_turns)
    return {name: rule(prompt, episode) for name, rule in AGENT_REWARDS.items()}


def total(components: dict[str, float]) -> float:
    return sum(MIX[name] * value for name, value in components.items())


def to_ids(text: str) -> list[int]:
    return [*TOKENIZER.encode_text(text), EOS]


RIGHT = scores(*ONCE, says("The result is 3."))


def test_the_right_answer_earns_everything():
    assert RIGHT == {"truth": 1, "calls": 1, "form": 1, "unfinished": 0, "repetition": 0}
    assert set(MIX) == set(AGENT_REWARDS)
    assert MIX["truth"] > MIX["calls"] + MIX["form"] and MIX["unfinished"] > MIX["calls"]
    thought = scores(calls(SUM, reasoning_content="Add."), *ONCE[1:], says("It is 3.", reasoning_content="So."),
                     thinking=True)
    assert thought == RIGHT


@pytest.mark.parametrize("answer", ["3.0", "the value: 3", "1 + 2 = 3", "是3。", "3"])
def test_numbers_are_compared_as_numbers(answer):
    assert scores(*ONCE, says(answer))["truth"] == 1


HACKS = {
    "every number": dict(talk=[*ONCE, says("0 1 2 3 4 5 6 7 8 9 10")]),
    "another call's result": dict(talk=[calls(PRODUCT), *returns({"result": "20"}), says("The result is 20.")]),
    "another call's result after the right one": dict(
        talk=[calls(SUM, PRODUCT), *returns({"result": "3"}, {"result": "20"}), says("The result is 20.")]),
    "the call, no answer": dict(talk=ONCE, raw=[EOS]),
    "blanks": dict(talk=ONCE, raw=to_ids(" \n ")),
    "the answer in the thinking only": dict(
        talk=[calls(SUM, reasoning_content="Add."), *ONCE[1:], says("Done.", reasoning_content="It is 3.")],
        thinking=True),
    "a wrong sum": dict(talk=[calls(("calculate_math", {"expression": "1 +"})), *returns({"error": "invalid syntax"}),
                              says("4")]),
    "calls for ever": dict(talk=[*ONCE * 4, calls(SUM)]),
}


@pytest.mark.parametrize("name", HACKS)
def test_without_the_truth_nothing_comes_near(name):
    hack = HACKS[name]
    components = scores(*hack["talk"], raw=hack.get("raw"), thinking=hack.get("thinking", False))
    assert components["truth"] == 0 and total(components) < total(RIGHT) - 0.99 * MIX["truth"]


@pytest.mark.parametrize("talk, value", [
    ([says("3")], 0), ([*ONCE, *ONCE, says("3")], 0),
    ([*ONCE, calls(PRODUCT), *returns({"result": "20"}), says("3")], 1),
    ([calls(("calculate_math", {"sum": "1"})), *returns({"error": "unknown argument 'sum'; known: expression"}),
      says("3")], -1)])
def test_more_calls_earn_no_more_and_wrong_ones_less(talk, value):
    assert scores(*talk)["calls"] == value


@pytest.mark.parametrize("raw, thinking", [
    ([END_THINK, *to_ids("\n\n3")], True),  # closed, nothing thought
    ([*TOKENIZER.encode_text("So.\n"), END_THINK, END_THINK, *to_ids("\n\n3")], True),
    ([*TOKENIZER.encode_text("So 3.")], True),  # never closed
    ([END_THINK, *to_ids("3")], False), ([END_CALL, *to_ids("3")], False), ([END_CALL, END_CALL, EOS], False)])
def test_tags_without_content_earn_nothing(raw, thinking):
    assert scores(raw=raw, thinking=thinking)["form"] == 0


def test_an_unfinished_episode_loses():
    components = scores(*ONCE, calls(PRODUCT), max_turns=2)
    assert components["unfinished"] == -1 and components["form"] == components["truth"] == 0 and total(components) < 0


def test_saying_it_twice_is_repetition():
    assert scores(*ONCE, says("The result is 3. " * 6))["repetition"] < -0.5


def test_prompts_that_can_earn_nothing_are_told_before_the_run(tmp_path):
    own = {"role": "system", "content": "", "tools": [{"type": "function", "function": {"name": "my_own_tool"}}]}
    rows = [{"conversations": [OFFER, user("1 + 2?")], "gt": [3]},
            {"conversations": [own, user("1 + 2?")], "gt": ["3"]},
            {"conversations": [user("1 + 2?")]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    no_gt, no_tool = find_unrewarded(PromptDataset(tmp_path / "rows.jsonl", TOKENIZER, 512))
    assert no_gt.startswith("1 of 3 prompts have no gt")
    assert no_tool.startswith("tool my_own_tool of 1 prompts is not in")
