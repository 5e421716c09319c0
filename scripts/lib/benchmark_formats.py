"""Multiple-choice benchmark files → questions, one function per format. Prompts are worded as lm-eval words them.

A function takes a row of the file and raises KeyError, TypeError or ValueError when the row is not of its format.
Besides the layout in which a benchmark was published (and, for ARC and OpenBookQA, that of the hub) a row may be
{"query", "choices", "gold"}.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dataset.reader import parse_row, read_lines
from model.cli import UserError


class Question(NamedTuple):
    """A prompt, the options that may follow it (after a space), which of them is right, and its subject."""

    context: str
    options: list[str]
    gold: int
    subject: str = ""


def lettered(row: dict) -> Question:
    """C-Eval, CMMLU (csv or json): question, A to D, answer. The options are the letters, their texts in the prompt."""
    row = {str(name).lower(): value for name, value in row.items()}
    choices = "".join(f"\n{letter}. {row[letter.lower()]}" for letter in "ABCD")
    letters = list("ABCD")
    return Question(f"{row['question'].strip()}{choices}\n答案：", letters, letters.index(row["answer"].strip()))


def stem_and_choices(row: dict) -> tuple[str, list[str], int]:
    """Question, options, and which is right, as AI2 lays them out (`question` is an object) or the hub (a text)."""
    if "query" in row:
        return row["query"].removeprefix("Question: ").strip(), row["choices"], row["gold"]
    nested = isinstance(row.get("question"), dict)
    source = row["question"] if nested else row
    stem = source["stem" if nested else "question_stem" if "question_stem" in row else "question"]
    choices = source["choices"]
    if isinstance(choices, list):
        choices = {part: [choice[part] for choice in choices] for part in ("text", "label")}
    return stem, choices["text"], choices["label"].index(row["answerKey"].strip())


def arc(row: dict) -> Question:
    """ARC Easy and Challenge."""
    stem, options, gold = stem_and_choices(row)
    return Question(f"Question: {stem}\nAnswer:", options, gold)


def openbookqa(row: dict) -> Question:
    """OpenBookQA: the options end the sentence."""
    return Question(*stem_and_choices(row))


def piqa(row: dict) -> Question:
    """PIQA: goal, sol1, sol2, label (0 or 1; as published in a file of its own, `{stem}-labels.lst`)."""
    goal, options, gold = (stem_and_choices(row) if "query" in row else
                           (row["goal"], [row["sol1"], row["sol2"]], int(row["label"])))
    return Question(f"Question: {goal}\nAnswer:", options, gold)


def siqa(row: dict) -> Question:
    """Social IQa: context, question, answerA to answerC; label (1 to 3, see PIQA) or correct (A to C)."""
    gold = list("ABC").index(row["correct"]) if "correct" in row else int(row["label"]) - 1
    return Question(f"Q: {row['context']} {row['question']}\nA:", [row[f"answer{letter}"] for letter in "ABC"], gold)


def hellaswag(row: dict) -> Question:
    """HellaSwag: activity_label, ctx_a, ctx_b, endings, label; WikiHow's marks in brackets are removed."""
    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    if "query" in row:
        return Question(row["query"], row["choices"], row["gold"])
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


FORMATS: dict[str, Callable[[dict], Question]] = {
    "ceval": lettered, "cmmlu": lettered, "arc": arc, "openbookqa": openbookqa, "piqa": piqa, "siqa": siqa,
    "hellaswag": hellaswag}


def read_questions(name: str, path: Path) -> list[Question]:
    """All questions of a file of benchmark `name`, or of the files of a folder. Raises UserError naming file and line.

    The subject is the row's; without one, that of a C-Eval or CMMLU file is its name. Labels may be beside it.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if re.search(r"\.(csv|tsv|jsonl?|parquet)(\.gz)?$", file.name))
        return [question for file in files for question in read_questions(name, file)]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    stem = re.sub(r"_(val|dev|test)$", "", path.name.split(".")[0]) if FORMATS[name] is lettered else ""
    label_path = path.with_name(f"{path.name.split('.')[0]}-labels.lst")
    labels = label_path.read_text("utf-8").split() if label_path.is_file() else None
    questions = []
    for number, line in read_lines(path):
        try:
            row = parse_row(line)
            question = FORMATS[name](row if labels is None else row | {"label": labels[number - 1]})
            if not all(isinstance(text, str) and text for text in (question.context, *question.options)):
                raise ValueError("question and options must be non-empty strings")
            if question.gold not in range(len(question.options)):
                raise ValueError(f"{question.gold} is not the index of an option")
        except KeyError as error:
            raise UserError(f"{path}:{number}: not a row of {name}: it has no {error}") from None
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{path}:{number}: not a row of {name}: {error}") from None
        questions.append(question._replace(subject=row.get("subject") or stem))
    if not questions:
        raise UserError(f"{path}: no question in it")
    return questions
