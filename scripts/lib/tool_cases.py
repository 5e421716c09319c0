"""Cases of tool calling: held-out tasks of the sample world, agent_rl rows, rows of the Berkeley leaderboard (BFCL)."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataset.jsonl import read_rows
from dataset.prompts import Prompt, PromptDataset
from dataset.sample_world import World
from model.chat import ChatTokenizer
from model.cli import UserError
from trainer.rl.tools import SCHEMAS, call_tool

JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "bool": "boolean"}


@dataclass(frozen=True)
class Case:
    """What is asked, and what is right: a value in the last answer (the prompt's `gt`), or the call in `accepted`."""

    kind: str
    prompt: Prompt
    shown: str
    accepted: dict | None = None  # {name: {argument: [accepted values]}}


def held_out_tasks(count: int, seed: int, prompt_of: Callable[..., Prompt]) -> list[Case]:
    """`count` expressions, and as many tasks of all the other tools in turn, half of each in either language."""
    world, cases = World(), []
    world.split, others = "heldout", [name for name in SCHEMAS if name != "calculate_math"]
    for kind in ("math", "mixed"):
        world.rng, asked = random.Random(f"{seed}/{kind}"), set()
        for number in range(count):
            world.lang = number // (1 if kind == "math" else len(others)) % 2
            name = "calculate_math" if kind == "math" else others[number % len(others)]
            for _ in range(100):  # a new one, as long as there are any
                task = world.task(name)
                if task.messages[0]["content"] not in asked:
                    break
            asked.add(task.messages[0]["content"])
            call, = json.loads(task.messages[1]["tool_calls"])
            value = next(iter(call_tool(**call, seed=seed).values()))
            prompt = prompt_of([world.offer([name]), task.messages[0]], [str(value)])
            accepted = {name: {key: [value] for key, value in call["arguments"].items()}}
            shown = call["arguments"]["expression"] if kind == "math" else task.messages[0]["content"]
            cases.append(Case(kind, prompt, shown, accepted))
    return cases


def read_cases(path: Path, tokenizer: ChatTokenizer, prompt_of: Callable[..., Prompt], longest: int,
               thinking: bool = False) -> list[Case]:
    """The cases of a file. Raises UserError when it is of neither kind."""
    rows = [(f"{path}:{number}", row) for number, row in read_rows(path)]
    if not rows or "function" not in rows[0][1]:
        data = PromptDataset(path, tokenizer, longest, thinking_ratio=float(thinking))
        for line in data.warnings:
            print(line)
        return [Case(path.stem, prompt, prompt.messages[-1]["content"]) for prompt in data.prompts]
    beside = path.with_name(f"{path.stem}_answers{path.suffix}")
    if not beside.is_file():
        raise UserError(f"{path}: its accepted calls are missing, {beside.name} beside it")
    answers = {row["id"]: row["ground_truth"] for _, row in read_rows(beside)}
    cases = []
    for where, row in rows:
        try:
            tools = [{"type": "function", "function": as_json_schema(function)} for function in row["function"]]
            (accepted,), (messages, *_) = answers[row["id"]], row["question"]
            offer = {"role": "system", "content": "", "tools": tools}
            if messages[0]["role"] == "system":
                offer, messages = {**messages[0], "tools": tools}, messages[1:]
            cases.append(Case(path.stem, prompt_of([offer, *messages]), messages[-1]["content"], accepted))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: no case of one function call: {type(error).__name__} {error}") from None
    return cases


def as_json_schema(value: object) -> object:
    """Python's names of types in a schema → JSON's."""
    if isinstance(value, dict):
        return {key: JSON_TYPES.get(part, part) if key == "type" and isinstance(part, str) else as_json_schema(part)
                for key, part in value.items()}
    return [as_json_schema(part) for part in value] if isinstance(value, list) else value


def is_accepted(call: dict, accepted: dict) -> bool:
    """Whether a call has the name and, for each argument, an accepted value; "" among these: it may be left out.

    As the leaderboard's checker compares: texts without case, blanks and , . / - _ * ^, numbers by value.
    """
    wanted = accepted.get(call["name"])
    return wanted is not None and fits(call["arguments"], wanted)


def fits(given: dict, wanted: dict) -> bool:
    return set(given) <= set(wanted) and all(
        any(alike(given[key], value) for value in values) if key in given else "" in values
        for key, values in wanted.items())


def alike(given: object, wanted: object) -> bool:
    if isinstance(given, str) and isinstance(wanted, str):
        return all_the_same(given) == all_the_same(wanted)
    if isinstance(given, dict) and isinstance(wanted, dict):
        return fits(given, wanted)
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(alike, given, wanted))
    return isinstance(given, bool) == isinstance(wanted, bool) and given == wanted


def all_the_same(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
