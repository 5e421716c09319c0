"""Made-up files of every kind through every data set: no traceback, and rows in = rows learned + rows reported.

Few by default; `FUZZ=10000 pytest tests/test_data_fuzz.py` makes as many.
"""

import codecs
import csv
import gzip
import io
import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from lab import TOKENIZER
from test_formats import FUZZ, Words, marked, rows, texts

from dataset.lm_dataset import DPODataset, PretrainDataset, SFTDataset
from dataset.prompts import PromptDataset
from model.cli import UserError

DATASETS = {"text": PretrainDataset, "chat": SFTDataset, "pair": DPODataset, "prompt": PromptDataset}
marked_rows = st.integers(0, 10**6).map(lambda seed: marked(random.Random(seed), Words()))
good_rows = {
    "text": st.builds(lambda text: {"text": text + "x" * len(text) ** 2}, texts.filter(str.strip)),
    "chat": marked_rows.filter(lambda row: row[0] == "chat").map(lambda row: row[1]),
    "pair": marked_rows.filter(lambda row: row[0] == "pair").map(lambda row: row[1])}
good_rows["prompt"] = good_rows["chat"]
bad_lines = st.sampled_from([b"", b" \t", b"oops", b"null", b"[1]", b"\xff\xfe", b'{"text": "\xe4"}', b"{",
                             b'{"a": 1}', b'{"text": NaN}', b'{"text": "\\ud800"}', b"[" * 2000, b"1e999",
                             b'{"text": ' + b"9" * 5000])


def lines_of(content: list[dict]) -> list[bytes]:
    return [json.dumps(row).encode() for row in content]


@st.composite
def files(draw) -> tuple[str, bytes, int]:
    """For which data set, a file, and how many rows are in it."""
    row_kind = draw(st.sampled_from([*DATASETS]))
    good = good_rows[row_kind]
    content = [draw(good), draw(good), *draw(st.lists(good | good | rows, max_size=6))]
    kind = draw(st.sampled_from(["lines", "lines", "array", "objects", "csv"]))
    if kind == "lines":
        lines = lines_of(content)
        for position, line in draw(st.lists(st.tuples(st.integers(1, 9), bad_lines), max_size=3)):
            lines.insert(position, line)
        data, count = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines), sum(bool(x.strip()) for x in lines)
    elif kind == "csv":
        content = [{name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
                   for row in content]
        names = sorted({name for row in content for name in row} | {"text"})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, delimiter=draw(st.sampled_from(",\t;")))
        writer.writeheader()
        writer.writerows(content)
        data, count = text.getvalue().encode("utf-8", "replace"), len(content)
    else:
        data = json.dumps(content, indent=draw(st.sampled_from([None, 1]))) if kind == "array" else "\n".join(
            json.dumps(row, indent=1) for row in content)
        data, count = data.encode(), len(content)
    data = codecs.BOM_UTF8 * draw(st.booleans()) + data
    return row_kind, gzip.compress(data) if draw(st.booleans()) else data, count


@FUZZ
@given(files(), st.sampled_from([8, 40, 60, 80, 120, 500]), st.booleans())
def test_rows_in_are_rows_learned_and_rows_reported(file, max_seq_len, packing):
    kind, data, count = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.write_bytes(data)
        options = {} if kind == "prompt" else {"packing": packing, "cache_dir": folder}
        try:
            dataset = DATASETS[kind](path, TOKENIZER, max_seq_len, skip_bad_rows=True, **options)
        except UserError as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and str(path) in message
            assert re.search(r"no usable|no answer|every prompt|are equal up to", message), message
            return
        num_bad, left_out = number(r"skipped ([\d,]+) bad", dataset), number(r"([\d,]+) [^;]*are left out", dataset)
        if kind == "prompt":
            assert len(dataset) + num_bad + left_out == count
            return
        num_rows = dataset.meta["documents"] // dataset.docs_per_row
        assert num_rows + num_bad == count and num_bad == dataset.meta["bad"]
        sequences = dataset.rows
        starts = np.concatenate(([0], np.load(dataset.folder / "ends.npy")))
        learned = np.unique(np.searchsorted(starts, sequences.start, "right"))  # documents
        assert len(learned) // dataset.docs_per_row + left_out == num_rows
        if kind == "text":
            assert sequences.length.sum() == dataset.meta["tokens"] - dataset.meta["documents"]
        batch = dataset.batch(np.arange(len(dataset)))
        assert len(batch["targets"]) == dataset.num_targets.sum() or kind == "pair"
        assert (dataset.num_targets > 0).all() and sequences.length.max() <= max_seq_len
        dataset.tokens = dataset.mask = None


def number(pattern: str, dataset) -> int:
    """The sum of the numbers that the warnings say."""
    return sum(int(text.replace(",", "")) for warning in dataset.warnings for text in re.findall(pattern, warning))
