"""Cases of tool calling: held-out tasks of the sample world, agent_rl rows, rows of the Berkeley leaderboard (BFCL)."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataset.prompts import Prompt, PromptDataset
from dataset.reader import read_rows
from dataset.sample_world import World, answer_value
from model.chat import ChatTokenizer
from model.cli import UserError
from trainer.rl.tools import SCHEMAS, call_tool

JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "bool": "boolean"}


@dataclass(frozen=True)
class Case:
    """A prompt and what is right: the ground truth of the prompt in the last answer, or the call in `accepted`."""

    kind: str
    prompt: Prompt
    shown: str  # the question, as it is printed
    accepted: dict | None = None  # {name: {argument: [accepted values]}}


def held_out_tasks(count: int, seed: int, make_prompt: Callable[..., Prompt]) -> list[Case]:
    """`count` expressions, and as many tasks of all the other tools in turn, half of each in either language."""
    world, cases = World(), []
    world.split, other_tools = "heldout", [name for name in SCHEMAS if name != "calculate_math"]
    for kind, names in (("math", ["calculate_math"]), ("mixed", other_tools)):
        world.rng, questions = random.Random(f"{seed}/{kind}"), set()
        for number in range(count):
            world.lang, name = number // len(names) % 2, names[number % len(names)]
            for _ in range(100):  # a new question, as long as there is one
                question, answer, *_ = world.task(name).messages
                if question["content"] not in questions:
                    break
            questions.add(question["content"])
            call, = json.loads(answer["tool_calls"])
            prompt = make_prompt([world.offer([name]), question], [answer_value(call_tool(**call, seed=seed))])
            accepted = {name: {key: [value] for key, value in call["arguments"].items()}}
            shown = call["arguments"]["expression"] if kind == "math" else question["content"]
            cases.append(Case(kind, prompt, shown, accepted))
    return cases


def read_cases(path: Path, tokenizer: ChatTokenizer, make_prompt: Callable[..., Prompt], max_len: int,
               thinking: bool = False) -> list[Case]:
    """The cases of a file. Raises UserError when it is of neither kind."""
    rows = [(f"{path}:{number}", row) for number, row in read_rows(path)]
    if not rows or "function" not in rows[0][1]:
        try:
            data = PromptDataset(path, tokenizer, max_len, thinking_ratio=float(thinking))
        except UserError as error:  # in the words of this program's flags
            text = str(error).replace(" (--skip_bad_rows 1 leaves such rows out)", "")
            raise UserError(text.replace("--max_seq_len", "--max_total_len")) from None
        for line in data.warnings:
            print(line.replace("--max_seq_len", "--max_total_len"))
        if unknown := [prompt.source for prompt in data.prompts if not prompt.ground_truth]:
            raise UserError(f"{unknown[0]}: no gt, with which an answer could be compared ({len(unknown)} such rows)")
        return [Case(path.stem, prompt, prompt.messages[-1]["content"]) for prompt in data.prompts]
    answers_path = path.with_name(f"{path.stem}_answers{path.suffix}")
    if not answers_path.is_file():
        raise UserError(f"{path}: its accepted calls are missing, {answers_path.name} beside it")
    answers = {row["id"]: row["ground_truth"] for _, row in read_rows(answers_path)}
    cases = []
    for source, row in rows:
        try:
            tools = [{"type": "function", "function": as_json_schema(function)} for function in row["function"]]
            (accepted,), (messages, *_) = answers[row["id"]], row["question"]
            system = {"role": "system", "content": "", "tools": tools}
            if messages[0]["role"] == "system":
                system, messages = {**messages[0], "tools": tools}, messages[1:]
            cases.append(Case(path.stem, make_prompt([system, *messages]), messages[-1]["content"], accepted))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: not a case with one function call: {type(error).__name__} {error}") from None
    return cases


def as_json_schema(value: object) -> object:
    """A schema with Python's names of types → with JSON's."""
    if isinstance(value, dict):
        return {key: JSON_TYPES.get(part, part) if key == "type" and isinstance(part, str) else as_json_schema(part)
                for key, part in value.items() if (key, part) != ("type", "any")}
    return [as_json_schema(part) for part in value] if isinstance(value, list) else value


def is_accepted(call: dict, accepted: dict) -> bool:
    """Whether a call has the name and, for each argument, an accepted value; "" among these: it may be left out.

    Values are compared as by the leaderboard: texts without case, blanks and , . / - _ * ^, numbers by value.
    """
    expected = accepted.get(call["name"])
    return expected is not None and arguments_match(call["arguments"], expected)


def arguments_match(arguments: dict, expected: dict) -> bool:
    """`expected`: {argument: [accepted values]}"""
    return set(arguments) <= set(expected) and all(
        any(values_match(arguments[key], value) for value in values) if key in arguments else "" in values
        for key, values in expected.items())


def values_match(value: object, expected: object) -> bool:
    if isinstance(value, str) and isinstance(expected, str):
        return normalize(value) == normalize(expected)
    if isinstance(value, dict) and isinstance(expected, dict):
        return arguments_match(value, expected)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(values_match, value, expected))
    return isinstance(value, bool) == isinstance(expected, bool) and value == expected


def normalize(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
