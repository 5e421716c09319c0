"""Rows → prompts for online RL: a conversation without its last answer, and the known values of a right answer."""

import hashlib
import json
import random
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

from dataset.reader import RowReport, read_rows
from model.chat import ChatTokenizer, read_json
from model.cli import UserError


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer. `ids` end where the answer begins: inside `<think>\n` if the model is to think."""

    ids: list[int]
    messages: list[dict]
    thinking: bool = False
    ground_truth: list[str] = field(default_factory=list)  # what a right answer contains; [] where it is unknown
    source: str = ""  # file:line

    @property
    def tools(self) -> list | str:
        """The tools on offer, from the first message."""
        return self.messages[0].get("tools") or []


class PromptDataset:
    """The prompts of a file of rlaif rows `{"conversations": […, placeholder]}` or agent_rl rows, which add `"gt"`.

    The placeholder, a last message of the assistant's, is dropped. `thinking_ratio` of the prompts ask for thinking,
    depending on the seed and the row alone. Prompts of more than `max_seq_len` tokens are left out, with a warning.
    """

    def __init__(self, data_path: str | Path, tokenizer: ChatTokenizer, max_seq_len: int, skip_bad_rows: bool = False,
                 thinking_ratio: float = 0.0, seed: int = 42):
        path, report = Path(data_path), RowReport(Path(data_path), skip_bad_rows)

        def parse(row: dict) -> Prompt:
            messages, ground_truth = row["conversations"], parse_ground_truth(row)
            thinking = random.Random(f"{seed} {messages}").random() < thinking_ratio
            return Prompt(tokenizer.prompt(messages, open_thinking=thinking), messages, thinking, ground_truth)

        prompts = [replace(prompt, source=f"{path}:{number}")
                   for number, prompt in read_rows(path, parse, report, "prompt")]
        self.prompts = [prompt for prompt in prompts if len(prompt.ids) <= max_seq_len]
        num_long = len(prompts) - len(self.prompts)
        self.warnings = report.warnings() + [
            f"{num_long:,} prompts of more than --max_seq_len {max_seq_len} tokens are left out"] * bool(num_long)
        if not self.prompts:
            raise UserError(f"{path}: no usable prompt in it{report.first_reason}"
                            + f"; {num_long:,} are too long for --max_seq_len {max_seq_len}" * bool(num_long))

    @property
    def hash(self) -> str:
        """Hash of all prompts and of their ground truth."""
        content = json.dumps([[prompt.ids, prompt.ground_truth] for prompt in self.prompts])
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def parse_ground_truth(row: dict) -> list[str]:
    """The values of `gt` as text; none where it is absent or null.

    Numbers become what Python writes, 1.50 becomes 1.5; a text keeps its spelling. Raises ValueError when it is not a
    list of values.
    """
    values = row.get("gt")
    values = [] if values in (None, "") else values
    if isinstance(values, str):  # a cell of a csv file
        with suppress(ValueError):
            values = read_json(values)
    if not isinstance(values, list) or not all(isinstance(value, (str, int, float)) for value in values):
        raise ValueError('gt must be a list of values, like ["42"]')
    return [decimal(value) if isinstance(value, float) else str(value) for value in values]


def decimal(value: float) -> str:
    """As Python writes it, but without an exponent: 0.00001, not 1e-05."""
    return format(Decimal(repr(value)), "f")
