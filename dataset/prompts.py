"""jsonl rows → prompts for online RL: the conversation without its last answer, and what is known of the right one."""

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from dataset.lm_dataset import parse_conversation, parse_row, read_rows
from model.chat import ChatTokenizer
from model.cli import UserError


@dataclass(frozen=True)
class Prompt:
    """What an answer is asked for. `ids` end where the answer begins: inside `<think>\n` if it shall think."""

    ids: list[int]
    messages: list[dict]
    thinking: bool = False
    ground_truth: list[str] = field(default_factory=list)  # what a right answer contains; [] where nobody knows
    source: str = ""  # file:line

    @property
    def tools(self) -> list | str:
        """What is offered to call, as it stands on the first message."""
        return self.messages[0].get("tools") or []


class PromptDataset:
    """The prompts of a file of rlaif rows `{"conversations": […, placeholder]}` or agent_rl rows, which add `"gt"`.

    A last message of the assistant's is a placeholder and dropped. `thinking_ratio` of the prompts ask for thinking:
    decided by the seed and the row. Prompts of more than `max_seq_len` tokens are left out and counted in `warnings`.
    """

    def __init__(self, data_path: str | Path, tokenizer: ChatTokenizer, max_seq_len: int, skip_bad_rows: bool = False,
                 thinking_ratio: float = 0.0, seed: int = 42):
        self.path, self.warnings = Path(data_path), []
        self.prompts: list[Prompt] = []
        too_long, bad = 0, []
        for number, line in read_rows(self.path):
            where = f"{self.path}:{number}"
            try:
                row = parse_row(line)
                messages, gt = parse_conversation(row), parse_ground_truth(row)
                messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
                thinking = random.Random(f"{seed} {messages}").random() < thinking_ratio
                ids = tokenizer.prompt(messages, open_thinking=thinking)
            except ValueError as error:
                if not skip_bad_rows:
                    raise UserError(f"{where}: {error} (--skip_bad_rows 1 leaves such rows out)") from None
                bad.append(f"line {number}: {error}")
                continue
            if len(ids) > max_seq_len:
                too_long += 1
            else:
                self.prompts.append(Prompt(ids, messages, thinking, gt, where))
        if bad:
            self.warnings.append(f"skipped {len(bad):,} bad rows of {self.path}, the first: {'; '.join(bad[:5])}")
        if too_long:
            self.warnings.append(f"{too_long:,} prompts of more than --max_seq_len {max_seq_len} tokens are left out")
        if not self.prompts:
            raise UserError(f"{self.path}: no usable prompt in it" + "; all are too long" * bool(too_long))

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts and what is known of their answers."""
        told = json.dumps([[prompt.ids, prompt.ground_truth] for prompt in self.prompts])
        return hashlib.blake2b(told.encode(), digest_size=12).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def parse_ground_truth(row: dict) -> list[str]:
    """The values of `gt` as text, numbers as they are written. Raises ValueError when it is not a list of values."""
    gt = row.get("gt", [])
    if not isinstance(gt, list) or not all(isinstance(value, (str, int, float)) for value in gt):
        raise ValueError('gt is a list of values, like ["42"]')
    return [str(value) for value in gt]
