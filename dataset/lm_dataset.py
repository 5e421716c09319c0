"""Row formats, and a data set for each: from the rows of a file to batches of token ids and targets.

    pretrain  {"text": text}                  <|im_start|> text <|im_end|>; every token is a target
    sft       {"conversations": [messages]}   a chat; what the assistant writes, with its <|im_end|>, is a target
    dpo       {"chosen": [messages],          two chats with the same prompt; what is written in the answers, with
               "rejected": [messages]}        their <|im_end|>, is a target

Rows of other formats are read as these (formats.py). A parser turns a row into documents, lists of segments: (text or
special token, whether it is a target of the loss). They are tokenised once (token_cache.py) and packed into rows of
`max_seq_len` positions (packing.py).
"""

import random
from pathlib import Path

import numpy as np
import torch

from dataset.packing import Rows, pack, truncate_at_answers
from dataset.prefix_sharing import collate_pairs
from dataset.token_cache import CACHE_DIR, TokenDataset
from model.chat import BOS, EOS, ChatTokenizer, Segment, render
from model.cli import UserError

SYSTEM_PROMPTS = {
    "zh": ("你是一个乐于助人的小语言模型。", "你是 MiniMind，请用简洁的话回答问题。",
           "请尽力回答用户的问题，不知道就说不知道。", "你是一位耐心的助手，说话清楚、准确。",
           "你是一个会中文和英文的聊天助手。"),
    "en": ("You are a small and helpful language model.", "You are MiniMind. Answer in a few clear words.",
           "Answer the user as well as you can, and say so when you do not know.",
           "You are a patient assistant who is clear and exact.",
           "You are an assistant who chats in Chinese and English."),
}

# -- row formats: a row → its document or documents. A row that cannot be used raises ValueError with the reason. ------


def parse_pretrain(row: dict) -> list[Segment]:
    return [(BOS, True), (row["text"], True), (EOS, True)]


def parse_sft(row: dict, seed: int, system_prompt_ratio: float, empty_think_ratio: float) -> list[Segment]:
    """`system_prompt_ratio` of the chats that have none get a system prompt; of those without reasoning,
    `empty_think_ratio` keep their empty think blocks. Which ones depends on the seed and the row alone."""
    messages = row["conversations"]
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise ValueError("no message of the assistant's that is learned")
    text = str(messages)
    rng = random.Random(f"{seed} {text}")
    add_system, keep_think = rng.random() < system_prompt_ratio, rng.random() < empty_think_ratio
    segments = render(messages, keep_empty_think=keep_think)
    if add_system and messages[0]["role"] != "system":
        language = "zh" if any("一" <= character <= "鿿" for character in text) else "en"
        segments = render([{"role": "system", "content": rng.choice(SYSTEM_PROMPTS[language])}]) + segments
    return segments


def parse_dpo(row: dict) -> list[list[Segment]]:
    if row["chosen"][:-1] != row["rejected"][:-1]:
        raise ValueError("the prompts of chosen and rejected differ; only their last messages may")
    thinks = any(messages[-1].get("reasoning_content") for messages in row.values())
    return [answer_segments(messages, side, thinks) for side, messages in row.items()]


def answer_segments(messages: list[dict], side: str, thinks: bool) -> list[Segment]:
    """A chat of which only the last message is a target.

    Where one answer of a pair `thinks`, an empty think block of the other is a choice of its author's, so a target too.
    """
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(f"{side} is not a prompt and an answer of the assistant's")
    prompt, chat = render(messages[:-1]), render(messages)
    header_end = len(prompt) + 2  # <|im_start|> and "assistant\n" are no choice
    answer = chat[header_end:-1]
    if not messages[-1].get("train", True):
        raise ValueError(f"the answer of {side} is not to be learned")
    return ([(segment, False) for segment, _ in chat[:header_end]]
            + [(segment, is_target or thinks) for segment, is_target in answer] + chat[-1:])


# -- data sets ---------------------------------------------------------------------------------------------------------


class PretrainDataset(TokenDataset):
    """Texts; a long one continues in the next sequence, so no target is lost."""

    row_kind = "text"

    def parse(self, row: dict) -> list[list[Segment]]:
        return [parse_pretrain(row)]

    def build_rows(self, start: np.ndarray, length: np.ndarray, packing: bool) -> tuple[Rows, np.ndarray, list[str]]:
        rows = pack(start, length, self.max_seq_len, packing, split=True)
        return rows, rows.sum_per_row(rows.length), []


class SFTDataset(TokenDataset):
    """Conversations; a long one ends at the last answer that fits, and is left out where none begins in time."""

    row_kind, has_loss_mask = "chat", True

    def __init__(self, data_path: str | Path, tokenizer: ChatTokenizer, max_seq_len: int, packing: bool = True,
                 skip_bad_rows: bool = False, cache_dir: str | Path = CACHE_DIR, *, seed: int = 42,
                 system_prompt_ratio: float = 0.2, empty_think_ratio: float = 0.2):
        super().__init__(data_path, tokenizer, max_seq_len, packing, skip_bad_rows, cache_dir, seed=seed,
                         system_prompt_ratio=system_prompt_ratio, empty_think_ratio=empty_think_ratio)

    def parse(self, row: dict) -> list[list[Segment]]:
        return [parse_sft(row, **self.settings)]

    def build_rows(self, start: np.ndarray, length: np.ndarray, packing: bool) -> tuple[Rows, np.ndarray, list[str]]:
        truncated, num_cut = truncate_at_answers(start, length, self.mask, self.max_seq_len)
        kept = np.array([n == whole or self.mask[begin + 1:begin + n + 1].any() for begin, n, whole in zip(
            start.tolist(), truncated.tolist(), length.tolist(), strict=True)])  # with something left to learn
        if not kept.any():
            raise UserError(f"{self.path}: no answer begins within --max_seq_len {self.max_seq_len}")
        rows = pack(start[kept], truncated[kept], self.max_seq_len, packing)
        num_truncated, num_lost = int((truncated < length).sum()), len(kept) - int(kept.sum())
        lost = 1 - truncated[kept].sum() / length.sum()
        return rows, rows.sum_per_row(rows.length), [
            f"{num_truncated:,} of {len(start):,} conversations exceed {self.max_seq_len} tokens and end at the last "
            f"answer that fits ({lost:.1%} of all tokens left out); {num_cut - num_lost:,} first answers are cut"
            + f"; {num_lost:,} conversations, whose answers begin later, are left out" * bool(num_lost)
        ] * bool(num_truncated)


class DPODataset(TokenDataset):
    """Preference pairs, each in one row as its prompt, once, and the two answers; `loss_count`: pairs.

    `max_seq_len` bounds each of the two documents of a pair, so a row has twice as many positions.
    `ref_logprobs` [documents], in the order of the rows: Σ log p_ref of each answer, which batches hand on, or None.
    """

    row_kind, has_loss_mask, docs_per_row, ref_logprobs = "pair", True, 2, None

    def parse(self, row: dict) -> list[list[Segment]]:
        return parse_dpo(row)

    def prompt_length(self, start: int, length: int) -> int:
        """Tokens before the answer of a document; `length` + 1 if nothing of the answer is left."""
        targets = np.flatnonzero(self.mask[start:start + length + 1])
        return int(targets[0]) if len(targets) else length + 1

    def build_rows(self, start: np.ndarray, length: np.ndarray, packing: bool) -> tuple[Rows, np.ndarray, list[str]]:
        truncated = np.minimum(length, self.max_seq_len)
        prompt = np.array([self.prompt_length(*document)
                           for document in zip(start[::2].tolist(), truncated[::2].tolist(), strict=True)])
        pairs = np.flatnonzero(prompt <= truncated.reshape(-1, 2).min(1))  # with something left of both answers
        if not len(pairs):
            raise UserError(f"{self.path}: every prompt fills --max_seq_len {self.max_seq_len}, no answer is left")
        tokens, num_answered = np.asarray(self.tokens), len(pairs)
        sides = [[tokens[start[i]:start[i] + truncated[i] + 1] for i in (2 * pair, 2 * pair + 1)] for pair in pairs]
        pairs = pairs[[not np.array_equal(chosen, rejected) for chosen, rejected in sides]]
        if not len(pairs):
            raise UserError(f"{self.path}: chosen and rejected are equal up to --max_seq_len {self.max_seq_len}")
        packed = pack(pairs, (truncated.reshape(-1, 2).sum(1) - prompt)[pairs], self.row_length, packing)
        documents = (2 * packed.start[:, None] + [0, 1]).ravel()
        rows = Rows(start[documents], truncated[documents].astype(np.int32), 2 * packed.row_offsets)
        num_cut, total = int((truncated < length).reshape(-1, 2).any(1)[pairs].sum()), len(start) // 2
        return rows, packed.sum_per_row(packed.length), [
            f"{num_cut:,} of {total:,} pairs have a side of more than {self.max_seq_len} tokens, which is cut; "
            f"{total - num_answered:,} more, whose prompt is that long, are left out"
            + f"; {num_answered - len(pairs):,} more, whose sides are then equal, are left out" * (
                len(pairs) < num_answered)
        ] * bool(num_cut or len(pairs) < total)

    @property
    def loss_count(self) -> np.ndarray:
        return np.diff(self.rows.row_offsets) // 2

    def batch(self, row_ids: np.ndarray) -> dict[str, torch.Tensor]:
        """See `prefix_sharing.collate_pairs`; documents 2i and 2i + 1 are the two of pair i. Row -1 is empty."""
        bounds = self.rows.row_offsets
        documents = np.concatenate([np.arange(bounds[row], bounds[row + 1]) for row in row_ids if row >= 0]
                                   or [np.arange(0)])
        groups, masks = [], []
        for pair in documents.reshape(-1, 2):
            start, length = self.rows.start[pair].tolist(), self.rows.length[pair].tolist()
            n = self.prompt_length(start[0], length[0])
            answers = [slice(begin + n, begin + positions + 1) for begin, positions in zip(start, length, strict=True)]
            groups.append((self.tokens[start[0]:start[0] + n], [self.tokens[answer] for answer in answers]))
            masks += [self.mask[answer] for answer in answers]
        batch = collate_pairs(groups, masks, len(row_ids) * self.row_length)
        if self.ref_logprobs is not None:
            batch["ref_logprobs"] = self.ref_logprobs[torch.from_numpy(documents)]
        return batch
