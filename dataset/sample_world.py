"""Write the sample data: a small, closed, bilingual (English and Chinese) world in every row format.

The data is SYNTHETIC: its towns, animals and people do not exist, its weather and exchange rates are random numbers,
its sentences come from templates. With it every stage can be run and measured in minutes without a download; a model
trained on it knows this world and nothing else. Three rules make the world checkable:

* An answer is canonical: skill, language and values determine its wording, so `is_correct` compares exactly.
* A combination (a fact, two numbers, a name, an expression, a wording) belongs to one split: train, val or heldout.
  Each file draws from its split alone, so every held-out case is new. Only facts have to be learned from the files:
  each is stated in pretrain.jsonl and, in portraits of one entity, in sft.jsonl, but a held-out question about it is
  in no file.
* Randomness is `random.Random` seeded with text, and sha256: a seed gives the same bytes on every machine.

    python dataset/sample_world.py --out DIR [--seed 0] [--scale 1.0]
"""

import argparse
import hashlib
import json
import operator
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, permutations, product
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from dataset import sample_texts as texts
from dataset.sample_texts import LANGS, Attribute, Text
from model.chat import parse_tool_calls
from model.cli import Parser, UserError, nonneg_float, run_main, seed_int
from model.files import write_atomically

Message = dict[str, Any]
Tree = Any  # an int, or (sign, Tree, Tree)

SKILLS = ("facts", "arithmetic", "thinking", "dialogue", "identity", "tools")
PRETRAIN_MIX = {"facts": 29, "tales": 6, "glossary": 4, "sums": 30, "calls": 20, "chats": 11}  # percent
SFT_MIX = (13, 29, 18, 23, 3, 14)  # percent, in the order of SKILLS
DPO_MIX = (20, 20, 10, 15, 10, 25)
HELDOUT_PERCENT, VAL_PERCENT = 12, 6
HELDOUT_CASES = 24  # per skill and language, at any scale
FILES = {  # rows at scale 1
    "pretrain": 5800, "pretrain_val": 100, "sft": 20500, "sft_val": 400, "heldout": 2 * len(SKILLS) * HELDOUT_CASES,
    "dpo": 1500, "dpo_val": 100, "reward": 18000, "reward_val": 400, "rlaif": 1500, "rlaif_val": 200,
    "agent_rl": 1500, "agent_rl_val": 200,
    "lora_identity": 600, "lora_identity_val": 40}
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
dumps = partial(json.dumps, ensure_ascii=False)


TOOL_MIX = (58, 8, 7, 7, 6, 6, 4, 4)  # percent, in the order of TOOLS; mostly arithmetic, the agent stage's task


def tool_schema(name: str) -> dict:
    """The tool as OpenAI's schema describes a function."""
    description, parameters, *_ = texts.TOOLS[name]
    properties = {key: {"type": json_type} for key, json_type in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


class Case(NamedTuple):
    """A checkable conversation. Its last message is the canonical answer."""

    key: str  # identifies the question, whatever its wording
    messages: list[Message]
    value: str  # the part of the answer that matters
    wrong: Message = {}  # well-formed, but false


def reply(content: str, **more: str) -> Message:
    return {"role": "assistant", "content": content, **more}


def turn(question: str, answer: str, **more: str) -> list[Message]:
    return [{"role": "user", "content": question}, reply(answer, **more)]


def format_tree(tree: Tree, tight: bool = False) -> str:
    """Write an expression with the fewest parentheses that keep its value; `tight`: its neighbour binds tighter."""
    if isinstance(tree, int):
        return str(tree)
    sign, left, right = tree
    text = f"{format_tree(left, sign == '*')} {sign} {format_tree(right, sign in '-*')}"
    return f"({text})" if tight and sign != "*" else text


def answer_value(result: dict) -> str:
    """The value of a tool's result that an answer states, as text: 14:30 of a date and time."""
    keys = ("temperature", "rate", "datetime", "translated_text", "characters", "result")
    value = str(next(result[key] for key in keys if key in result))
    return value[11:16] if "datetime" in result else value


def evaluate(tree: Tree) -> int:
    return tree if isinstance(tree, int) else SIGNS[tree[0]](evaluate(tree[1]), evaluate(tree[2]))


class World:
    """What depends on the seed (the facts, the split of every combination), and the rows of the file being written.

    `rng`, `split`, `persona` and `decks` are of that file, `number` and `lang` of that row; all methods draw with them.
    """

    def __init__(self, seed: int = 0):
        self.seed, self.split, self.number, self.lang, self.rng = seed, "train", 0, 0, random.Random(f"{seed}/facts")
        self.persona = texts.MINIMIND
        self._parts: dict[tuple[Any, str], list[Any]] = {}
        self.facts = {(entity, attribute): self.rng.choice(attribute.values)
                      for attribute in texts.ATTRIBUTES for entity in attribute.entities}
        # One attribute of each entity, in turn, is for held-out questions, so that questions about every attribute are
        # also in training; of every fourth entity another one is for validation.
        self.pairs: dict[str, list[tuple[Text, Attribute]]] = {"train": [], "val": [], "heldout": []}
        for number, entity in enumerate((*texts.TOWNS, *texts.ANIMALS, *texts.PEOPLE)):
            attributes = [attribute for attribute in texts.ATTRIBUTES if entity in attribute.entities]
            for i in range(len(attributes)):
                split = "heldout" if i == 0 else "val" if i == 1 and number % 4 == 0 else "train"
                self.pairs[split].append((entity, attributes[(number + seed + i) % len(attributes)]))

    def _deck(self, rng: random.Random) -> Iterator[tuple[Text, Attribute]]:
        """All facts again and again, mixed and grouped by entity in turn, so each is stated equally often."""
        pairs = list(self.facts)
        while True:
            rng.shuffle(pairs)
            yield from pairs
            entities = [entity for entity, _ in pairs]
            yield from sorted(pairs, key=lambda pair: entities.index(pair[0]))

    def _hash(self, key: Any) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{key}".encode()).digest()[:8], "big")

    def split_of(self, *parts: Any) -> str:
        """Name the split of a combination. Order does not count: 3 + 5 held out means 5 + 3 held out."""
        bucket = self._hash("/".join(sorted(map(str, parts)))) % 100
        return "heldout" if bucket < HELDOUT_PERCENT else "val" if bucket < HELDOUT_PERCENT + VAL_PERCENT else "train"

    def draw_new(self, make: Callable[[], Any]) -> Any:
        """Draw combinations until one belongs to the split."""
        while self.split_of(*(parts := make())) != self.split:
            pass
        return parts

    def split_options(self, options: tuple[Any, ...]) -> list[Any]:
        """Return the options that belong to the split: ranked by hash, so that no split of a short list is empty."""
        if (options, self.split) not in self._parts:
            ranked = sorted(options, key=self._hash)
            held, val = (max(2, len(ranked) * percent // 100) for percent in (HELDOUT_PERCENT, VAL_PERCENT))
            parts = {"heldout": ranked[:held], "val": ranked[held:held + val], "train": ranked[held + val:]}
            self._parts[options, self.split] = parts[self.split]
        return self._parts[options, self.split]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def realise(self, text: Text, **slots: Any) -> str:
        """One of the alternatives of a text in the language of the row; slots may be texts too."""
        slots = {name: value[self.lang] if isinstance(value, tuple) else value for name, value in slots.items()}
        sentence = self.rng.choice(text[self.lang].split("|")).format(**slots)
        return sentence[:1].upper() + sentence[1:]  # "the moss bear eats ..." may begin a sentence

    def phrase(self, text: Text, **slots: Any) -> str:
        """A question, one in three with an opener or a closer."""
        question, opener, closer = self.realise(text, **slots), self.realise(texts.OPENERS), self.realise(texts.CLOSERS)
        roll = self.rng.random()
        return opener + question if roll < 0.2 else question + closer if roll < 0.35 else question

    def make_case(self, ask: Text, answer: Text, right: dict[str, Any], false: dict[str, Any], value: Any,
             reasoning: list[str] | None = None) -> Case:
        """One question, whose slots and the answer's are `right`; `false` changes some of them."""
        more = {"reasoning_content": "\n".join(reasoning)} if reasoning else {}
        messages = turn(self.phrase(ask, **right), self.realise(answer, **right), **more)
        wrong = reply(self.realise(answer, **{**right, **false}), **more)
        return Case("\n".join([*(reasoning or []), messages[1]["content"]]), messages, str(value), wrong)

    # ---- skills

    def case(self, skill: str, end: str = "answer") -> Case:
        """A case of a skill in the split and language of the row; `end` is where a tool conversation ends."""
        return self.tools(end) if skill == "tools" else getattr(self, f"{skill}_case")()

    def facts_case(self) -> Case:
        entity, attribute = pair = self.rng.choice(self.pairs[self.split])
        ask = tuple(text.replace("{noun}", noun) for text, noun in zip(texts.FACT, attribute.noun, strict=True))
        value = self.facts[pair]
        other = self.rng.choice([option for option in attribute.values if option != value])
        return self.make_case(ask, attribute.canonical, {"e": entity, "v": value}, {"v": other}, value[self.lang])

    def arithmetic_case(self) -> Case:
        rng, sign = self.rng, self.rng.choices("+-<", (45, 30, 25))[0]
        if sign == "<":
            _, a, b = self.draw_new(lambda: ("<", *rng.sample(range(10, 100), 2)))
            low, high = sorted((a, b))
            value = texts.COMPARE[1][self.lang].format(hi=high, lo=low)[:-1]
            right = {"a": a, "b": b, "hi": high, "lo": low}
            return self.make_case(*texts.COMPARE, right, {"hi": low, "lo": high}, value)
        # The second number has one digit, which a small model can learn; too many pairs to know them by heart.
        _, a, b = self.draw_new(lambda: (sign, rng.randint(0 if sign == "+" else 9, 999), rng.randint(0, 9)))
        n, text = evaluate((sign, a, b)), f"{a} {sign} {b}"
        answer, wrong = (f"{text} = {{n}}.", f"{text} = {{n}}。"), n + rng.choice((1, 2, 10))
        return self.make_case(texts.MATH, answer, {"x": self.reword(text), "n": n}, {"n": wrong}, f"{text} = {n}")

    def reword(self, expression: str) -> str:
        """Write an expression like people do: as it is, without spaces, or (one operator, so no doubt) in words."""
        if self.chance(0.15) and expression.count(" ") == 2:
            return self.in_words(expression)
        return expression.replace(" ", "") if self.chance(0.15) else expression

    def in_words(self, expression: str) -> str:
        for sign, words in texts.SPOKEN.items():
            expression = expression.replace(sign, words[self.lang])
        return expression

    def thinking_case(self, kind: tuple[Text, Text] | None = None) -> Case:
        rng, comma = self.rng, (", ", "、")[self.lang]
        kind = kind or rng.choice((texts.SUM, texts.SORT, texts.LETTERS))
        if kind is texts.SORT:
            _, *items = self.draw_new(lambda: ("sort", *rng.sample(range(10, 100), 3)))
            low, middle, high = sorted(items)
            steps = [f"{rank[self.lang]}{n}" for rank, n in zip(texts.RANKS, (low, high, middle), strict=True)]
            value, wrong = (comma.join(map(str, order)) for order in ((low, middle, high), (middle, low, high)))
        elif kind is texts.LETTERS:
            items = self.draw_new(lambda: rng.sample([food[self.lang] for food in texts.FOODS], rng.choice((2, 3))))
            totals = list(accumulate(map(len, items)))
            steps = [f"{word}: {len(word)} -> {total}" for word, total in zip(items, totals, strict=True)]
            value, wrong = totals[-1], totals[-1] + rng.choice((-1, 1, 2))
        else:
            clean = False
            while not clean:  # the steps are sums as well: reasoning must not give away a held-out one
                a, b, c = items = self.draw_new(lambda: (rng.randint(1, 900), rng.randint(1, 9), rng.randint(1, 9)))
                clean = self.split_of("+", a, b) == self.split_of("+", a + b, c) == "train"
            steps = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"]
            value, wrong = a + b + c, a + b + c + rng.choice((-1, 1, 2))
        shown = (" + " if kind is texts.SUM else comma).join(map(str, items))
        return self.make_case(*kind, {"x": shown, "n": value}, {"n": wrong}, value, steps)

    def dialogue_case(self) -> Case:
        """The user states some facts about themselves and later asks for one or more of them."""
        slots = self.rng.sample(texts.SLOTS, self.rng.choice((1, 2, 2, 3)))
        statements = [(slot, self.rng.choice(self.split_options(slot.values[self.lang]))) for slot in slots]
        messages = self.small_talk(texts.HELLO, 0.3)
        for slot, value in statements:
            messages += turn(self.realise(slot.statement, v=value), self.realise(slot.reply, v=value))
        messages += self.small_talk(texts.THANKS, 0.1)
        for slot, value in self.rng.sample(statements, len(slots)):
            messages += turn(self.realise(slot.question), self.realise(slot.answer, v=value))
        other = self.rng.choice([option for option in self.split_options(slot.values[self.lang]) if option != value])
        return Case(dumps(messages), messages, value, reply(self.realise(slot.answer, v=other)))

    def small_talk(self, turns: tuple[Text, Text], probability: float) -> list[Message]:
        return turn(self.realise(turns[0]), self.realise(turns[1])) if self.chance(probability) else []

    def identity_case(self) -> Case:
        intent, question = self.rng.choice(self.split_options(texts.IDENTITY_PHRASES[self.lang]))
        messages = turn(question, self.realise(self.persona[intent]))
        return Case(question, messages, "MiniMind", reply(self.realise(texts.IMPOSTOR)))

    def tools(self, end: str) -> Case:
        """A conversation with tools up to the call or the answer; now and then a question that needs none of them."""
        several = self.split == "train" and end == "answer"
        if several and self.chance(0.1):
            plain = self.case(self.rng.choice(("facts", "dialogue", "identity")))
            return plain._replace(messages=[self.offer([]), *plain.messages])
        names = self.rng.choices(tuple(texts.TOOLS), TOOL_MIX, k=2 if several and self.chance(0.25) else 1)
        if several:  # several rounds under one offer: more to learn from a row
            names = names * self.rng.randint(1, 4 // len(names))
        tasks = [self.task(name) for name in names]
        messages = [self.offer(names), *(message for task in tasks for message in task.messages)]
        task = other = tasks[-1]
        while other.messages[1] == task.messages[1]:
            other = self.task(names[-1])
        if end == "call":
            false = self.corrupt(task.messages[1]["tool_calls"], other.messages[1]["tool_calls"])
            return task._replace(messages=messages[:-2], wrong=reply("", tool_calls=false))
        false = self.corrupt(task.messages[3]["content"], other.messages[3]["content"])
        return task._replace(messages=messages, wrong=reply(false))

    def corrupt(self, text: str, other: str) -> str:
        """Change one digit (never to 0: a JSON number stays a JSON number); a text without digits becomes the other."""
        places = [i for i, character in enumerate(text) if character.isdigit()]
        if not places:
            return other
        place = self.rng.choice(places)
        return text[:place] + self.rng.choice([d for d in "123456789" if d != text[place]]) + text[place + 1:]

    def offer(self, needed: list[str]) -> Message:
        """Return a system message that offers one to three tools, the needed ones among them."""
        names = list(dict.fromkeys(needed))
        spare = self.rng.choice((0, 0, 0, 0, 1, 1, 2)) if len(names) == 1 else int(not names)  # long rows get none
        names += self.rng.sample([name for name in texts.TOOLS if name not in names], spare)
        schemas = [tool_schema(name) for name in self.rng.sample(names, len(names))]
        return {"role": "system", "content": "", "tools": dumps(schemas)}

    def random_tree(self) -> Tree:
        """Two or three numbers of two or three digits, at most one product (so that results stay short)."""
        a, b, c = (self.rng.randint(*((10, 99) if self.chance(0.4) else (100, 999))) for _ in range(3))
        first, second = self.rng.choice(("++", "+-", "-+", "--", "+*", "*+", "-*", "*-"))
        if self.chance(0.5):
            return first, a, b
        if self.chance(0.5) or first + second in ("++", "+-"):  # a + (b - c) reads like (a + b) - c: one tree per text
            return second, (first, a, b), c
        return first, a, (second, b, c)

    def task(self, name: str) -> Case:
        """One round with a tool. The result is computed if it can be, and drawn if only the tool can know it."""
        rng, lang, (_, parameters, asks, answer) = self.rng, self.lang, texts.TOOLS[name]
        if name == "calculate_math":
            (tree,) = self.draw_new(lambda: (self.random_tree(),))
            expression = format_tree(tree)
            slots, values, result = {"x": self.reword(expression)}, [expression], {"result": str(evaluate(tree))}
        elif name == "unit_converter":
            _, value, units = self.draw_new(lambda: ("unit", rng.randint(2, 99), rng.choice(tuple(texts.FACTORS))))
            converted = value * texts.FACTORS[units]
            if self.chance(0.5):
                value, converted, units = converted, value, units[::-1]
            slots, values = {"x": value, "a": texts.UNITS[units[0]], "b": texts.UNITS[units[1]]}, [value, *units]
            result = {"result": converted}
        elif name == "get_current_weather":
            place, sky = rng.choice(self.split_options(texts.PLACES[lang])), rng.choice(texts.WEATHER)[lang]
            slots, values = {"x": place, "a": sky}, [place]
            result = {"city": place, "temperature": f"{rng.randint(1, 35)}°C", "humidity": f"{rng.randint(30, 90)}%",
                      "condition": sky}
        elif name == "get_exchange_rate":
            a, b = rng.choice(self.split_options(tuple(permutations(texts.CURRENCIES, 2))))
            slots, values = {"a": a, "b": b}, [a[0], b[0]]
            result = {"from": a[0], "to": b[0], "rate": rng.randint(11, 999) / 100}
        elif name == "get_current_time":  # a zone must have been seen to be named: new here is the city in these words
            city, text = rng.choice(self.split_options(tuple(product(texts.CITIES, asks[lang].split("|")))))
            asks, slots, values = (text, text), {"x": city}, [f"{city[2]}/{city[0]}"]
            date, time = (rng.randint(1, 12), rng.randint(1, 28)), (rng.randrange(24), rng.randrange(60))
            result = {"datetime": "2025-{:02}-{:02} {:02}:{:02}:00".format(*date, *time), "timezone": values[0]}
        elif name == "random_number":
            _, a, b = self.draw_new(lambda: ("random", rng.randint(1, 50), rng.randint(51, 999)))
            slots, values, result = {"a": a, "b": b}, [a, b], {"result": rng.randint(a, b)}
        else:  # a text to translate or to measure
            colour, food = rng.choice(self.split_options(tuple(product(texts.COLOURS, texts.FOODS))))
            pair, to = (f"{colour[0]} {food[0]}", colour[1] + food[1]), rng.randrange(2)
            if name == "text_length":
                slots, values = {"x": pair}, [pair[lang]]
                result = {"characters": len(pair[lang]), "words": len(pair[lang].split())}
            else:
                slots = {"x": pair[1 - to], "b": (("English", "英文"), ("Chinese", "中文"))[to]}
                values, result = [pair[1 - to], ("English", "Chinese")[to]], {"translated_text": pair[to]}
        question, value = self.phrase(asks, **slots), answer_value(result)
        calls = dumps([{"name": name, "arguments": dict(zip(parameters, values, strict=True))}])
        tool = {"role": "tool", "content": dumps(result)}
        messages = [*turn(question, "", tool_calls=calls), tool, reply(self.realise(answer, r=value, **slots))]
        return Case(question, messages, value)

    # ---- rows: one method per file

    def pretrain_row(self) -> Message:
        """A paragraph of one kind. Facts come from the deck, so all of them are stated."""
        kind = self.rng.choices(tuple(PRETRAIN_MIX), PRETRAIN_MIX.values())[0]
        both, length, parts = self.chance(0.25), self.rng.randint(160, (440, 300)[self.lang]), []
        while sum(map(len, parts)) < length:
            entity, attribute = pair = next(self.decks[self.lang])
            fact = {"text": attribute.statements, "e": entity, "v": self.facts[pair]}
            food, city = self.rng.choice(texts.FOODS), self.rng.choice(texts.CITIES)
            if kind == "facts":
                for _ in range(1 + both):  # once more in the other language, and back
                    parts.append(self.realise(**fact))
                    self.lang ^= both
            elif kind == "tales":
                name, place = self.rng.choice(texts.NAMES[self.lang]), self.rng.choice(texts.PLACES[self.lang])
                parts.append(self.realise(texts.TALES, n=name, c=place, f=food, e=entity, s=self.realise(**fact)))
            elif kind == "glossary":
                count, zone = len(food[self.lang]), f"{city[2]}/{city[0]}"
                parts.append(self.realise(texts.GLOSSARY, f=food, k=count, t=food[::-1], c=city, z=zone))
            elif kind == "sums":
                ask, answer = self.case(self.rng.choice(("arithmetic", "thinking"))).messages
                steps = answer.get("reasoning_content", "").splitlines()
                parts += [ask["content"]] * both + steps + [answer["content"]]
            else:
                tool = self.rng.choices(tuple(texts.TOOLS), TOOL_MIX)[0]
                messages = (self.task(tool) if kind == "calls" else self.dialogue_case()).messages
                parts += [message.get("tool_calls", message["content"]).strip("[]") for message in messages]
        separator = "\n" if kind in ("sums", "calls", "chats") else " " if both or self.lang == 0 else ""
        return {"text": separator.join(parts)}

    def sft_row(self) -> Message:
        """A conversation about one skill; where questions are short, several of them, since a turn costs little."""
        skill = self.rng.choices(SKILLS, SFT_MIX)[0]
        rounds = 1 if skill in ("dialogue", "tools") else self.rng.randint(1, 5)
        messages = [message for _ in range(rounds) for message in
                    (self.portrait() if skill == "facts" and self.chance(0.3) else self.case(skill).messages)]
        return {"conversations": messages + self.small_talk(self.rng.choice((texts.THANKS, texts.BYE)), 0.08)}

    def portrait(self) -> list[Message]:
        """All facts about one entity, in any order: without it, those that no question is about would be forgotten."""
        entity = self.rng.choice((*texts.TOWNS, *texts.ANIMALS, *texts.PEOPLE))
        known = [(attribute, value) for (other, attribute), value in self.facts.items() if other == entity]
        sentences = [self.realise(attribute.canonical, e=entity, v=value) for attribute, value in
                self.rng.sample(known, len(known))]
        return turn(self.phrase(texts.ABOUT, e=entity), (" ", "")[self.lang].join(sentences))

    def heldout_row(self) -> Message:
        skill, end = SKILLS[self.number // (2 * HELDOUT_CASES)], ("call", "answer")[self.number // 2 % 2]
        case = self.case(skill, end)
        return {"conversations": case.messages, "skill": skill, "lang": LANGS[self.lang], "key": case.key}

    def dpo_row(self, false: float = 0.6) -> Message:
        """The right, short answer is preferred to a false (so often), a rude or a rambling one."""
        return self.pair(self.case(self.rng.choices(SKILLS, DPO_MIX)[0], self.rng.choice(("call", "answer"))), false)

    def pair(self, case: Case, false: float) -> Message:
        *prompt, right = case.messages
        bad = case.wrong if self.chance(false) else reply(self.realise(texts.BAD, a=right["content"] or "..."))
        return {"chosen": [*prompt, right], "rejected": [*prompt, bad]}

    def reward_row(self) -> Message:
        """A pair as for DPO. In training more of them are false, which is harder to learn than rude, and some are
        portraits, one with a false fact, since a reward model forgets what it is not trained on."""
        if self.split != "train":
            return self.dpo_row()
        if self.chance(0.85):
            return self.dpo_row(0.85)
        *prompt, right = self.portrait()
        entity, attribute = pair = self.rng.choice([pair for pair in self.facts
                                                    if pair[0][self.lang].removeprefix("the ") in right["content"]])
        values = self.facts[pair], self.rng.choice([v for v in attribute.values if v != self.facts[pair]])
        true, false = (self.realise(attribute.canonical, e=entity, v=value) for value in values)
        return self.pair(Case("", [*prompt, right], "", reply(right["content"].replace(true, false))), 0.85)

    def rlaif_row(self) -> Message:
        """Words to count the letters of. Fine-tuning shows this with thinking only; without it, a model has to find out
        that it can write the steps into the answer."""
        case = self.thinking_case(texts.LETTERS)
        return {"conversations": [*case.messages[:-1], reply("无")], "gt": [case.value]}

    def agent_rl_row(self) -> Message:
        """Sums of three numbers in words, where fine-tuning has only sums of two. In training one row in three is as
        there, which would be forgotten otherwise."""
        if self.split == "train" and self.chance(1 / 3):
            task = self.task("calculate_math")
            return {"conversations": [self.offer(["calculate_math"]), task.messages[0], reply("")], "gt": [task.value]}
        tree, text = 0, "("
        while "(" in text or text.count(" ") < 4:  # words have no parentheses
            (tree,) = self.draw_new(lambda: (self.random_tree(),))
            text = format_tree(tree)
        question = self.phrase(texts.MATH, x=self.in_words(text))
        return {"conversations": [self.offer(["calculate_math"]), *turn(question, "")], "gt": [str(evaluate(tree))]}

    def lora_identity_row(self) -> Message:
        """The new identity; in training half of the rows are ordinary ones, which would be forgotten otherwise."""
        if self.split == "train" and self.chance(0.5):
            return self.sft_row()
        return {"conversations": self.identity_case().messages}

    def rows(self, name: str, count: int) -> list[Message]:
        """The rows of a file, half of them in each language, without repeats as long as there is something new."""
        self.rng = random.Random(f"{self.seed}/{name}")  # a stream for each file: none changes when another one grows
        self.decks = [self._deck(random.Random(f"{self.seed}/{name}/{lang}")) for lang in LANGS]
        self.persona = texts.NIA if name.startswith("lora") else texts.MINIMIND
        self.split = "val" if name.endswith("_val") else "heldout" if name == "heldout" else "train"
        make, seen, rows = getattr(self, f"{name.removesuffix('_val')}_row"), set(), []
        for self.number in range(count):
            self.lang = self.number % 2
            for _ in range(500):
                row = make()
                key = (self.lang, row.pop("key", None) or dumps(row))
                if key not in seen:
                    break
            seen.add(key)
            rows.append(row)
        self.rng.shuffle(rows)
        return rows


def write(out: Path, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write all files into the folder `out`. → the number of rows of each file

    `scale` multiplies the rows, but pretrain always has enough to state every fact, and heldout stays as it is.
    """
    world, counts = World(seed), {}
    for name, size in FILES.items():
        count = size if name == "heldout" else max(300 if name == "pretrain" else 20, round(size * scale))
        path = Path(out) / f"{name}.jsonl"
        write_atomically(path, "".join(dumps(row) + "\n" for row in world.rows(name, count)))
        counts[path.name] = count
    return counts


def is_correct(expected: Message, answer: Message) -> bool:
    """Compare two assistant messages: the tool calls where either has one, else the text. Reasoning does not count.

    Calls may have any form that the chat format takes. A malformed answer is wrong, never an error.
    """
    try:
        expected_calls, calls = parse_tool_calls(expected), parse_tool_calls(answer)
        return expected_calls == calls and (bool(calls) or expected["content"].strip() == answer["content"].strip())
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=seed_int, default=0, help="another seed, another world")
    parser.add_argument("--scale", type=nonneg_float, default=1.0, help="factor on the number of rows, above 0")
    args = parser.parse_args()
    if not 0 < args.scale <= 100:
        raise UserError(f"--scale {args.scale}: choose a number above 0 and at most 100")
    try:
        counts = write(args.out, args.seed, args.scale)
    except OSError as error:
        raise UserError(f"--out {error.filename or ''} {error.strerror}") from None
    print(f"synthetic sample world, seed {args.seed}, scale {args.scale}:")
    for name, num_rows in counts.items():
        print(f"{args.out / name}: {num_rows} rows, {(args.out / name).stat().st_size} bytes")


if __name__ == "__main__":
    run_main(main)
