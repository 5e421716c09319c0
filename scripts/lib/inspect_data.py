"""What a data file holds, as `scripts/prepare_data.py --inspect` prints it before anything is trained on it."""

import itertools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from dataset.formats import recognise
from dataset.lm_dataset import DPODataset, PretrainDataset, SFTDataset
from dataset.prompts import PromptDataset
from dataset.reader import RowReport, file_format, open_unpacked, read_rows
from model.chat import ChatTokenizer
from model.cli import UserError

ROW_KINDS = {"dpo": "pair", "pretrain": "text", "sft": "chat", "rl": "prompt"}
DATASETS = {"dpo": DPODataset, "pretrain": PretrainDataset, "sft": SFTDataset}
DEFAULT_LENGTHS = {"pretrain": 340, "sft": 768, "dpo": 1024, "rl": 1024}  # of the stages
SHOWN = 3000  # characters of the first row


def inspect(path: Path, kind: str | None, tokenizer: ChatTokenizer, max_seq_len: int | None, sft_options: dict) -> None:
    """Print what was recognised, the first row as the model reads it, counts, lengths, and what is left out and why.

    `sft_options`: arguments of `SFTDataset`, for rows of that kind.
    """
    report = RowReport(path, skip=True)
    row = next((row for _, row in read_rows(path, report=report)), None)
    if row is None:
        raise UserError(f"{path}: no row in it{report.first_reason}")
    with open_unpacked(path) as file:
        name = file_format(file, path)
    kind = kind or guess_kind(row)
    try:
        row_format = recognise(row, ROW_KINDS[kind])
    except ValueError as error:
        raise UserError(f"{path}: --kind {kind}: {error}") from None
    print(f"{path}: {name}, {row_format}, read for {kind} (--kind)")
    max_seq_len = max_seq_len or DEFAULT_LENGTHS[kind]
    with tempfile.TemporaryDirectory() as cache:
        if kind == "rl":
            data = PromptDataset(path, tokenizer, max_seq_len, skip_bad_rows=True)
            lengths = np.array([len(prompt.ids) for prompt in data.prompts])
            documents = [(data.prompts[0].ids, [False] * len(data.prompts[0].ids))]
            counts = f"{len(data):,} prompts, {sum(bool(prompt.ground_truth) for prompt in data.prompts):,} with gt"
        else:
            data = DATASETS[kind](path, tokenizer, max_seq_len, skip_bad_rows=True, cache_dir=cache,
                                  **(sft_options if kind == "sft" else {}))
            ends = np.load(data.folder / "ends.npy")
            lengths = np.diff(ends, prepend=0)
            mask = data.mask if data.has_loss_mask else np.ones_like(data.tokens)
            documents = [(data.tokens[end - length:end].tolist(), mask[end - length:end].tolist()) for end, length in
                         list(zip(ends, lengths, strict=True))[:data.docs_per_row]]
            counts = (f"{data.meta['documents']:,} documents, {data.meta['tokens']:,} tokens, "
                      f"{data.num_targets.sum():,} learned, {data.meta['bad']:,} bad rows; "
                      f"{len(data):,} packed rows of {data.row_length}, {data.utilization:.1%} full")
            data.tokens = data.mask = None  # closes the files, which Windows wants before it removes them
    marks = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("{+", "+}")
    print(f"\nThe first row as the model reads it; {marks[0]}what is learned{marks[1]}:\n")
    for ids, mask in documents:
        print(mark_learned(tokenizer, ids, mask, marks), end="\n\n")
    print(counts)
    low, middle, high, longest = np.percentile(lengths, (0, 50, 95, 100)).astype(int)
    print(f"tokens: {low:,} at least, {middle:,} at the median, {high:,} at 95%, {longest:,} at most; "
          f"{np.mean(lengths > max_seq_len):.1%} exceed --max_seq_len {max_seq_len:,}")
    print("".join(f"{warning}\n" for warning in data.warnings) or "nothing is left out\n", end="")


def guess_kind(row: dict) -> str:
    """What the row can be trained on. Raises UserError when that is nothing."""
    for kind, row_kind in ROW_KINDS.items():
        try:
            recognise(row, row_kind)
        except ValueError as error:
            reason = error
        else:
            return "rl" if kind == "sft" and "gt" in row else kind
    raise UserError(f"{reason}; formats: {os.path.join('dataset', 'formats.py')}")


def mark_learned(tokenizer: ChatTokenizer, ids: list[int], mask: list[bool], marks: tuple[str, str]) -> str:
    """The text of the ids, what is learned of it between `marks`."""
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
    texts = [(learned, tokenizer.decode([i for i, _ in run], keep_special_tokens=True)) for learned, run in runs]
    text = "".join(f"{marks[0]}{text}{marks[1]}" if learned else text for learned, text in texts)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}{marks[1]} …"
