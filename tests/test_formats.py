"""Ordinary files and rows are read for what they are; what cannot be read is named; nothing in a row is lost silently.

FUZZ=10000 tries so many rows of each kind instead of a few.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import TOKENIZER

from dataset.formats import FORMATS, normalise
from dataset.lm_dataset import SFTDataset
from dataset.reader import CHUNK, RowReport, parse_row, read_lines, read_rows, read_text
from model.chat import EOS, render
from model.cli import UserError, run_main
from scripts import prepare_data

# ------------------------------------------------------------------------------------------------------------- files

ROWS = [{"id": "1", "text": "one, \"two\"\nthree"}, {"id": "", "text": "你好 😀"}, {"id": "3", "text": " x ]}, [{ "}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_csv(separator: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "text"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    out = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


FILES = {
    "lines": LINES, "byte order mark": codecs.BOM_UTF8 + LINES, "CRLF": LINES.replace(b"\n", b"\r\n"),
    "byte order mark, blank line": codecs.BOM_UTF8 + b"\n" + LINES,
    "blank lines": b"\n \n" + LINES.replace(b"\n", b"\n\t\n\n"), "no newline at the end": LINES[:-1],
    "array": json.dumps(ROWS).encode(), "array, laid out": codecs.BOM_UTF8 + json.dumps(ROWS, indent=4).encode(),
    "objects, laid out": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "csv": as_csv(","), "csv of Excel": codecs.BOM_UTF8 + as_csv(";"), "tsv": as_csv("\t"),
}  # fmt: skip


def read(path: Path, content: bytes) -> list[dict]:
    path.write_bytes(content)
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("name", [*FILES, "parquet"])
def test_rows_are_read_from_every_file_whatever_it_is_called(tmp_path, name):
    content = FILES[name] if name in FILES else as_parquet()
    for path in ("rows.jsonl", "rows.txt", "rows.jsonl.gz"):
        assert read(tmp_path / path, content) == ROWS
        assert read(tmp_path / path, gzip.compress(content)) == ROWS


def test_rows_are_numbered_by_their_lines_or_else_by_themselves(tmp_path):
    path = tmp_path / "rows"
    for content, numbers in ((b"\n{}\n\n{}", [2, 4]), (b"[{},\n\n{}]", [1, 2]), (b"text\na\n\"b\nb\"\n", [2, 4])):
        path.write_bytes(content)
        assert [number for number, _ in read_lines(path)] == numbers


@pytest.mark.parametrize("indent", [None, 2])
def test_a_long_array_is_read_a_little_at_a_time(tmp_path, indent):
    rows = [{"text": str(number) * random.Random(number).randrange(99)} for number in range(20_000)]
    assert len(json.dumps(rows)) > CHUNK // 2
    with mock.patch("dataset.reader.CHUNK", 1000):
        path = tmp_path / "rows.json"
        assert read(path, json.dumps(rows, indent=indent).encode()) == rows
        path.write_bytes(b'[{"text": "x"},' * 1 + b'{"text": "y"},' * 100_000)  # never ends
        lines = read_lines(path)
        assert [parse_row(next(lines)[1])["text"] for _ in range(3)] == ["x", "y", "y"]
    with pytest.raises(UserError, match=r"rows.json:100002: cannot be read: not JSON, or cut off"):
        list(read_lines(path))


NOT_ROWS = {
    "empty": (b"", "the file is empty"), "only a mark": (codecs.BOM_UTF8, "the file is empty"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "a Git LFS pointer.* `git lfs pull`"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "UTF-16 text.* `iconv -f UTF-16 -t UTF-8`"),
    "UTF-16 without a mark": ('{"text": "x"}'.encode("utf-16-le"), "UTF-16 text"),
    "HTML": (b"\n<!DOCTYPE html><title>404</title>", "an HTML or XML page.* download"),
    "XML": (b"<?xml version='1.0'?><Error>", "an HTML or XML page"),
    "WAV": (b"RIFF\0\0\0\0WAVEfmt \0", "an image or a sound"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0", "an image: this model reads text only"),
    "JPEG": (b"\xff\xd8\xff\xe0", "an image"), "zip": (b"PK\x03\x04\x14\0", "a zip archive: unpack it"),
    "bzip2": (b"BZh91AY", "bzip2"), "xz": (b"\xfd7zXZ\0", "xz"), "zstd": (b"\x28\xb5\x2f\xfd", "zstd"),
    "zeros": (bytes(100), "a binary file"), "PDF": (b"%PDF-1.7", "a PDF"),
    "torn parquet": (b"PAR1 and no more", ":1: cannot be read"),
    "torn gzip": (gzip.compress(LINES)[:-9], "cannot be read"),
    "csv without quotes": (b"text\none, two\n", ":1: cannot be read: more cells than the header names"),
    "csv with a stray quote": (b'text,label\n"one,1\ntwo,2\n', "cannot be read: unexpected end of data"),
    "tsv with a stray quote": (b'text\tlabel\n"one" of them\t1\n', "cannot be read: '\t' expected after '\"'"),
    "two columns of one name": (b"text,text\none,two\n", "cannot be read: two columns are called 'text'"),
    "torn array": (b'[{"text": "x"}, {"te', ":2: cannot be read: not JSON, or cut off"),
    "array without an end": (b'[{"text": "x"}', ":2: cannot be read: not JSON, or cut off"),
    "two arrays": (b'[{"text": "x"}]\n[1]', ":2: cannot be read: text after the end of the array"),
    "csv in GBK": ("text\n你好\n".encode("gbk"), "not UTF-8.*`iconv -f GB18030 -t UTF-8`"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_ROWS)
def test_a_file_without_rows_is_named_for_what_it_is(tmp_path, name):
    content, words = NOT_ROWS[name]
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "rows.jsonl", content)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:") and "\n" not in str(caught.value)


def test_progress_counts_the_bytes_of_the_file_also_where_json_was_written_anew(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "今天天气很好" * 9}] * 20, ensure_ascii=False), "utf-8")
    report = RowReport(path)
    assert len(list(read_rows(path, report=report))) == 20
    assert 0.95 < report.num_bytes / path.stat().st_size < 1.05
    path.write_text('[{"text": "\\ud800"}]', "utf-8")
    with pytest.raises(UserError, match=":1: .*surrogate"):
        list(read_rows(path))


def test_a_text_may_begin_with_a_bracket(tmp_path):
    (tmp_path / "poem.txt").write_text("<poem>\nroses", "utf-8")
    assert read_text(tmp_path / "poem.txt") == "<poem>\nroses"


def test_text_that_a_parquet_file_holds_as_bytes_is_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    def parquet(value: bytes) -> bytes:
        out = io.BytesIO()
        write_table(pyarrow.table({"text": pyarrow.array([value], pyarrow.binary())}), out)
        return out.getvalue()

    assert read(tmp_path / "rows.parquet", parquet("你好".encode())) == [{"text": "你好"}]
    with pytest.raises(UserError, match="cannot be read: not UTF-8"):
        read(tmp_path / "rows.parquet", parquet(b"\xff"))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path):
    missing = mock.patch.dict(sys.modules, {"pyarrow": None, "pyarrow.parquet": None})
    with missing, pytest.raises(UserError, match="pip install pyarrow"):
        read(tmp_path / "rows.parquet", b"PAR1")


# -------------------------------------------------------------------------------------------------------------- rows


def chat(*contents: str, system: str | None = None) -> dict:
    """The canonical conversation of these contents."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"conversations": [{"role": "system", "content": system}][:system is not None] + messages}


def answer(content: str | None, **fields) -> dict:
    """A row with this answer."""
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, **fields}]}


def talk(*pairs: tuple[str, str], **row) -> dict:
    return {"conversations": [{"from": name, "value": value} for name, value in pairs], **row}


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"name": "f", "arguments": {"x": 1}}
CALLED = {"conversations": [{"role": "user", "content": "q"},
                            {"role": "assistant", "content": "", "tool_calls": [CALL]},
                            {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]}
SYSTEM = {"role": "system", "content": "", "tools": TOOLS}
OFFERED = {"conversations": [SYSTEM, *CALLED["conversations"]]}
PAIR = {"chosen": chat("q", "good")["conversations"], "rejected": chat("q", "bad")["conversations"]}
SPELT = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
CHAT_ROWS = {
    "canonical": (chat("q", "a"), chat("q", "a")),
    "messages": ({"messages": chat("q", "a")["conversations"]}, chat("q", "a")),
    "JSON text": ({"messages": json.dumps(chat("q", "a")["conversations"])}, chat("q", "a")),
    "ShareGPT": (talk(("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")), chat("q", "a", "r", "b")),
    "ShareGPT, system": (talk(("system", "s"), ("human", "q"), ("gpt", "a")), chat("q", "a", system="s")),
    "ShareGPT, tools": (talk(("human", "q"), ("function_call", json.dumps(CALL)), ("observation", "r"), ("gpt", "a"),
                             tools=json.dumps(TOOLS)), OFFERED),
    "row's system": (chat("q", "a") | {"system": "s"}, chat("q", "a", system="s")),
    "row's system again": (chat("q", "a", system="s") | {"system": "s"}, chat("q", "a", system="s")),
    "row's tools": (CALLED | {"tools": TOOLS}, OFFERED),
    "row's functions": (CALLED | {"functions": TOOLS}, OFFERED),
    "the question's tools": ({"messages": [CALLED["conversations"][0] | {"tools": json.dumps(TOOLS)},
                                           *CALLED["conversations"][1:]]}, OFFERED),
    "a later message's tools": ({"messages": [*CALLED["conversations"][:3],
                                              CALLED["conversations"][3] | {"tools": TOOLS}]}, OFFERED),
    "alpaca": ({"instruction": "i", "input": "", "output": "a"}, chat("i", "a")),
    "alpaca, all of it": ({"instruction": "i", "input": "j", "output": "a", "history": [["q", "b"]], "system": "s"},
                          chat("q", "b", "i\nj", "a", system="s")),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, chat("q", "a")),
    "the same in messages": ({"prompt": chat("q", "b", "r")["conversations"],
                              "completion": [{"role": "assistant", "content": "a"}]},
                             {"conversations": [{"role": "user", "content": "q"},
                                                {"role": "assistant", "content": "b", "train": False},
                                                *chat("r", "a")["conversations"]]}),
    "xLAM": ({"query": "q", "answers": json.dumps([CALL]), "tools": json.dumps(TOOLS)},
             {"conversations": [SYSTEM, {"role": "user", "content": "q"},
                                {"role": "assistant", "tool_calls": json.dumps([CALL])}]}),
    "text parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "r"}, "s"]},
                                 {"role": "assistant", "content": "a"}]}, chat("qrs", "a")),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, *chat("q", "a")["conversations"]]},
                  chat("q", "a", system="s")),
    "function_call": (answer(None, function_call={"name": "f", "arguments": '{"x": 1}'}),
                      answer(None, tool_calls=[CALL])),
    "a call in the content": (answer(SPELT), answer("", tool_calls=[CALL])),
    "text and calls": (answer(f"I look.\n{SPELT}\n{SPELT}\n"), answer("I look.", tool_calls=[CALL, CALL])),
    "calls twice": (answer(SPELT, tool_calls=[CALL]), answer("", tool_calls=[CALL])),
    "thinking": (answer("<think>\nhm\n</think>\n\na"), answer("a", reasoning_content="hm")),
    "thinking, opened by the prompt": (answer("hm\n</think>\n\na"), answer("a", reasoning_content="hm")),
    "thinking and a call": (answer(f"<think>hm</think>{SPELT}"),
                            answer("", reasoning_content="hm", tool_calls=[CALL])),
    "reasoning": (answer("a", reasoning="hm"), answer("a", reasoning_content="hm")),
    "only reasoning": (answer("", reasoning_content="hm"), answer("", reasoning_content="hm")),
    "a result with its tags": (talk(("human", "q"), ("gpt", SPELT), ("tool", "<tool_response>\nr\n</tool_response>"),
                                    ("gpt", "a")), CALLED),
    "a question without a word": (chat("", "a"), chat("", "a")),
    "null columns": ({"text": None, "messages": None, "system": None, "tools": None, **chat("q", "a")}, chat("q", "a")),
    "weight 0": (answer("a", weight=0), answer("a", train=False)),
    "weight 1": (answer("a", weight=1.0), answer("a")),
    "loss false": (answer("a", loss=False), answer("a", train=False)),
    "train false": (answer("a", train=False), answer("a", train=False)),
    "train true": (answer("a", train=True, loss=None), answer("a")),
}  # fmt: skip
PAIR_ROWS = {
    "canonical": PAIR, "strings": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "TRL": {"prompt": PAIR["chosen"][:1], "chosen": PAIR["chosen"][1:], "rejected": PAIR["rejected"][1:]},
    "the prompt again": {"prompt": "q", **PAIR},
    "LLaMA-Factory, ShareGPT": talk(("human", "q"), chosen={"from": "gpt", "value": "good"},
                                    rejected={"from": "gpt", "value": "bad"}),
    "LLaMA-Factory, alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
}  # fmt: skip


def same(canonical: dict) -> dict:
    """Whatever the list is called."""
    return {"conversations": canonical["messages"]} if "messages" in canonical else canonical


@pytest.mark.parametrize("name", CHAT_ROWS)
def test_a_conversation_in_any_format_is_the_canonical_row(name):
    row, expected = CHAT_ROWS[name]
    before = json.dumps(row)
    canonical, unused = normalise(row, "chat")
    expected = same(expected)
    for message in canonical["conversations"]:  # a field that holds nothing says nothing
        if message.get("content") is None:
            message["content"] = ""
    for message in expected["conversations"]:
        message["content"] = message.get("content") or ""
    assert canonical == expected and unused == []
    assert normalise(canonical, "chat") == (canonical, []) and json.dumps(row) == before
    assert render(canonical["conversations"]) == render(expected["conversations"])


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_a_pair_in_any_format_is_the_canonical_row(name):
    assert normalise(PAIR_ROWS[name], "pair") == (PAIR, [])


def test_prompts_of_any_format_lose_their_placeholder_and_keep_what_is_known():
    expected = {"conversations": chat("q")["conversations"], "gt": ["4"]}
    for row in (chat("q", ""), chat("q"), {"prompt": "q"}, {"instruction": "q", "output": None}, talk(("human", "q")),
                {"prompt": [{"role": "user", "content": "q"}], "completion": "4"}):
        assert normalise(row | {"gt": ["4"]}, "prompt") == (expected, [])


def test_keys_that_are_not_used_are_named():
    row = {"id": 7, "source": "", "text": "x", "messages": [
        {"role": "user", "content": "q", "name": "Bo", "train": True, "reasoning_content": "x", "tool_calls": []},
        {"role": "assistant", "content": "a", "value": "b", "weight": 1}]}
    canonical, unused = normalise(row, "chat")
    assert canonical == chat("q", "a") | {"conversations": canonical["conversations"]}
    assert unused == ["id", "text", "message.name", "message.reasoning_content", "message.train", "message.value"]
    assert normalise({"text": "x", "meta": {"a": 1}}, "text") == ({"text": "x"}, ["meta"])


BAD_ROWS = {
    "unknown": ("chat", {"question": "q", "answer": "a"},
                'a row is {"conversations": .*; this one has question, answer'),
    "text for chat": ("chat", {"text": "x"}, "this one has text"),
    "chat for text": ("text", chat("q", "a"), 'a pretraining row is {"text": …}; this one has conversations'),
    "no keys": ("chat", {}, "this one has nothing"),
    "no role": ("chat", {"messages": [{"speaker": "A", "says": "x"}]}, "message 1: it has no role, but speaker, says"),
    "unknown role": ("chat", {"messages": [{"role": "bot", "content": "x"}]}, "message 1: unknown role 'bot'"),
    "empty": ("chat", chat("q", ""), "message 2: the answer is empty"),
    "null": ("chat", answer(None), "message 2: the answer is empty"),
    "blank": ("chat", answer(" \n"), "message 2: the answer is empty"),
    "missing": ("chat", {"messages": [{"role": "user"}, {"role": "assistant"}]}, "message 2: the answer is empty"),
    "no question": ("chat", {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]},
                    "message 1: no content"),
    "alpaca without an answer": ("chat", {"instruction": "i", "output": ""}, "message 2: the answer is empty"),
    "an earlier answer": ("prompt", chat("q", "", "r", "a"), "message 2: the answer is empty"),
    "image part": ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"},
                                                                     {"type": "image_url", "image_url": {}}]}]},
                   "message 1: this model reads text only; part 2 of the content is image_url"),
    "images": ("chat", chat("q", "a") | {"images": ["x.png"]}, "this model reads text only; the row has images"),
    "number": ("chat", chat("q", 3), "message 2: content must be text, not int"),
    "text before <think>": ("chat", answer("Well <think>hm</think>a"), "message 2: text before <think>"),
    "a second block": ("chat", answer("<think>a</think>b<think>c</think>"), "message 2: a second think block"),
    "thinking twice": ("chat", answer("<think>a</think>b", reasoning_content="c"), "message 2: a second think block"),
    "open thinking": ("chat", answer("<think>a"), "message 2: a <think> that is not closed"),
    "an open call": ("chat", answer('<tool_call>{"name": "f"}'), "message 2: a <tool_call> that is not closed"),
    "text after a call": ("chat", answer(f"{SPELT} so"), "message 2: a <tool_call> .* text after one"),
    "no call": ("chat", answer("<tool_call>f(1)</tool_call>"), "message 2: a <tool_call> is not JSON"),
    "two lists of calls": ("chat", answer(SPELT, tool_calls=[CALL, CALL]), "message 2: other tool_calls"),
    "two sorts of calls": ("chat", answer("", tool_calls=[CALL], function_call=CALL),
                           "message 2: function_call beside"),
    "call by no name": ("chat", talk(("human", "q"), ("function_call", "{}")), "message 2: a tool call must be"),
    "two lists of tools": ("chat", OFFERED | {"tools": [{"name": "g"}]}, "message 1: other tools than in tools"),
    "tools": ("chat", chat("q", "a") | {"tools": "[{"}, "tools is not JSON"),
    "a tool": ("chat", chat("q", "a") | {"tools": ["f"]}, "tools: a tool is an object"),
    "two systems": ("chat", chat("q", "a", system="s") | {"system": "t"}, "system: .* another system prompt"),
    "weight": ("chat", answer("a", weight=0.5), "message 2: weight is 0.5, not 0, 1, true or false"),
    "history": ("chat", {"instruction": "i", "output": "a", "history": ["q"]}, "history must be"),
    "equal": ("pair", PAIR | {"rejected": PAIR["chosen"]}, "chosen and rejected are equal"),
    "no prompt": ("pair", {"chosen": "a", "rejected": "b"}, "chosen: the prompt that it answers is missing"),
    "another prompt": ("pair", {"prompt": "other", **PAIR}, "chosen: it neither answers the prompt"),
    "nothing asked": ("prompt", {"messages": [{"role": "assistant", "content": "a"}]}, "no message before the answer"),
    "empty side": ("pair", {"prompt": "q", "chosen": "a", "rejected": ""}, "rejected: message 2: the answer is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_by_what_is_wrong(name):
    kind, row, words = BAD_ROWS[name]
    with pytest.raises(ValueError, match=words):
        normalise(row, kind)


# --------------------------------------------------------------------------------------------------------- data sets


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learned(path: Path, length: int = 340, **options) -> tuple[SFTDataset, list[str]]:
    """The data set of a file, and what is learned of each of its documents, special tokens spelt out."""
    options = {"system_prompt_ratio": 0, "empty_think_ratio": 0, **options}
    data = SFTDataset(path, TOKENIZER, length, cache_dir=path.parent / "cache", **options)
    ends = np.load(data.folder / "ends.npy")[:-1]
    return data, [TOKENIZER.decode(ids[mask != 0].tolist(), True)
                  for ids, mask in zip(np.split(data.tokens, ends), np.split(data.mask, ends), strict=True)]


def test_rows_in_are_rows_learned_and_rows_reported(tmp_path):
    good = [row for name, (row, _) in CHAT_ROWS.items() if name not in ("weight 0", "train false", "loss false")]
    bad = [row for kind, row, _ in BAD_ROWS.values() if kind == "chat"]
    path = write(tmp_path / "rows.jsonl", [row for pair in itertools.zip_longest(good, bad)
                                           for row in pair if row is not None])
    data, answers = learned(path, skip_bad_rows=True)
    assert data.meta["documents"] == len(answers) == len(good) and all(answers)
    assert data.warnings[0].startswith(f"skipped {len(bad)} bad rows of {path}, the first: line ")
    with pytest.raises(UserError, match="rows.jsonl:2: a row is "):
        learned(path)


def test_keys_that_are_not_used_are_counted_also_when_the_tokens_are_cached(tmp_path):
    rows = [chat("q", "a") | {"id": number, "gt": ["x"]} for number in range(3)] + [answer("a", x=1)]
    path = write(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        assert learned(path)[0].warnings == ["keys that are not used, with the number of rows that have them: "
                                             "'id' (3), 'gt' (3), 'message.x' (1)"]


def test_an_answer_that_is_switched_off_is_read_and_not_learned(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no", "weight": 0},
                {"role": "user", "content": "r"}, {"role": "assistant", "content": "yes", "weight": 1}]
    path = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    data, answers = learned(path)
    assert answers == ["yes<|im_end|>"] and "no" in TOKENIZER.decode(data.tokens[:].tolist())
    with pytest.raises(UserError, match="rows.jsonl:1: no message of the assistant's that is learned"):
        learned(write(path, [{"messages": messages[:2]}]))


def test_conversations_without_an_answer_that_fits_are_left_out_and_counted(tmp_path):
    long = chat("1" * 80, "never")
    rows = [long, chat("q", "a"), chat("q", "b", "1" * 80, "c"), chat("q", "1" * 80), long]
    path = write(tmp_path / "rows.jsonl", rows)
    data, _ = learned(path, 64)
    asked = Counter(data.batch(np.arange(len(data)))["targets"].tolist())
    a, b, one = (TOKENIZER.encode_text(text)[0] for text in "ab1")
    assert asked.keys() == {a, b, one, EOS} and (asked[a], asked[b], asked[EOS]) == (1, 1, 2) and asked[one] > 50
    assert "4 of 5 conversations exceed 64 tokens" in data.warnings[0] and "1 first answers are cut" in data.warnings[0]
    assert data.warnings[0].endswith("2 conversations, whose answers begin later, are left out")
    assert (data.num_targets > 0).all()
    with pytest.raises(UserError, match="no answer begins within --max_seq_len 64"):
        learned(write(path, [long]), 64)

def inspected(capsys, path: Path, *flags: str) -> str:
    with mock.patch.object(sys, "argv", ["prepare_data.py", "--inspect", str(path), *flags]):
        prepare_data.main()
    return capsys.readouterr().out


def test_inspecting_a_file_shows_what_is_recognised_learned_and_left_out(tmp_path, capsys):
    path = tmp_path / "rows.bin"
    rows = [{"instruction": "q", "input": "", "output": "a", "id": 1}, {"instruction": "q", "output": ""}]
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    out = inspected(capsys, path)
    assert f"{path}: JSON, alpaca, read for sft" in out and "user\nq<|im_end|>" in out and "{+a<|im_end|>+}" in out
    assert all(words in out for words in ("1 documents", "1 bad rows", "2: message 2: the answer is empty", "'id' (1)"))
    out = inspected(capsys, write(path, [chat("1" * 90, "a"), chat("q", "a")]), "--max_seq_len", "64")
    assert "50.0% exceed --max_seq_len 64" in out and "1 conversations, whose answers begin later, are left out" in out
    assert "read for dpo" in inspected(capsys, write(path, [PAIR])) and "read for pretrain" in inspected(
        capsys, write(path, [{"text": "x"}]))
    with pytest.raises(SystemExit, match="2"), \
            mock.patch.object(sys, "argv", ["", "--inspect", str(path), "--kind", "dpo"]):
        run_main(prepare_data.main)
    assert "--kind dpo" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    system = inspected(capsys, write(path, [chat("q", "a")]), "--system_prompt_ratio", "1")
    assert "system\n" in system and "system\n" not in inspected(capsys, path, "--system_prompt_ratio", "0")
    with pytest.raises(SystemExit):
        inspected(capsys, path, "--out", str(tmp_path / "out"))
    assert "give it without --out" in capsys.readouterr().err
    assert "1 prompts, 1 with gt" in inspected(capsys, write(path, [chat("q", "") | {"gt": [1]}]))
    for row, words in (({"a": 1}, "this one has a"), (chat("q", ""), "no usable row in it; line 1: message 2")):
        with pytest.raises(UserError, match=words):
            inspected(capsys, write(path, [row]))


# -------------------------------------------------------------------------------------------------------------- fuzz

FUZZ = settings(max_examples=int(os.environ.get("FUZZ", 50)), deadline=None, derandomize="FUZZ" not in os.environ,
                suppress_health_check=list(HealthCheck), database=None)
TAGS = ("", "<think>", "</think>", "<tool_call>", "</tool_call>", SPELT, "<tool_response>", "\n", "{}", "[]", "null")
texts = st.lists(st.sampled_from([*TAGS, "a", "答", "\ud800"]), max_size=3).map("".join)
values = st.sampled_from([None, True, False, 0, 1, 0.5, float("nan"), "", "x", [], {}, [None], [[]], {"a": [1]}, ["x"],
                          [{"type": "text", "text": "x"}], [{"type": "image_url"}], "[1]", "{}", '{"name": 3}']) | texts
calls = st.sampled_from([CALL, [CALL], json.dumps(CALL), json.dumps([CALL]), {"function": CALL}]) | values
messages = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["system", "user", "assistant", "tool", "function_call", "bot"]) | values,
    "from": st.sampled_from(["human", "gpt", "observation", "function_call"]) | values,
    "content": values, "value": values, "reasoning_content": values, "tools": st.just(TOOLS) | values,
    "tool_calls": calls, "function_call": calls, "weight": values, "train": values, "name\n": values})
lists = st.lists(messages, max_size=4)
conversations = lists | lists.map(json.dumps) | messages | values
FIELDS = sorted({field for _, needed, optional in FORMATS.values() for field in (*needed, *optional)})
rows = st.fixed_dictionaries({}, optional={name: conversations for name in (*FIELDS, "system", "tools", "gt", "id")})


@FUZZ
@given(st.sampled_from(["text", "chat", "pair", "prompt"]), rows | st.sampled_from(FIELDS).flatmap(
    lambda name: st.fixed_dictionaries({name: lists})))
def test_no_row_ends_in_a_traceback(kind, row):
    before = repr(row)
    try:
        canonical, unused = normalise(row, kind)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(name, str) for name in unused)
        for name in canonical.keys() - {"text", "gt"}:
            assert canonical[name] == normalise(canonical, kind)[0][name] if kind != "prompt" else True
            try:
                render(canonical[name])
            except ValueError as error:  # half a surrogate pair
                assert "not text" in str(error)
    assert repr(row) == before


class Words:
    """Words that occur nowhere else."""

    def __init__(self):
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"w{self.count}w"


def marked(dice: random.Random, word: Words) -> tuple[str, dict]:
    """A good row of a random format, every value a word of its own, with things that nobody uses."""
    def message(role: str) -> dict:
        names = dice.choice([("role", "content"), ("from", "value")])
        alias = {"user": "human", "assistant": "gpt", "tool": "observation"} if names[0] == "from" else {}
        text = [{"type": "text", "text": word()}] if dice.random() < 0.2 else word()
        written = {names[0]: alias.get(role, role), names[1]: text}
        if role == "assistant" and dice.random() < 0.5:
            written |= dice.choice([{"reasoning_content": word()}, {"thinking": word()}, {"train": False},
                                    {"tool_calls": [{"name": word(), "arguments": {word(): word()}}]},
                                    {"function_call": {"name": word(), "arguments": json.dumps({word(): word()})}},
                                    {names[1]: f"<think>{word()}</think>{word()}"},
                                    {names[1]: f'{word()}<tool_call>{{"name": "{word()}"}}</tool_call>'}])
        return written | ({dice.choice(["name", "tool_call_id", "x"]): word()} if dice.random() < 0.2 else {})

    def turns() -> list[dict]:
        return [message("system")] * (dice.random() < 0.3) + [
            message(role) for _ in range(dice.randint(1, 3)) for role in ("user", "assistant", "tool")][:-1]

    kind = dice.choice(["chat", "pair"])
    if kind == "chat":
        row = dice.choice([
            lambda: {dice.choice(["conversations", "messages"]): turns()},
            lambda: {"instruction": word(), "input": word(), "output": word(), "history": [[word(), word()]]},
            lambda: {"prompt": word(), "completion": word()}, lambda: {"prompt": turns()[:-1], "completion": word()},
            lambda: {"query": word(), "answers": json.dumps([{"name": word(), "arguments": {}}])}])()
    else:
        prompt = dice.choice([lambda: {"prompt": word()}, lambda: {"messages": turns()[:-1]},
                              lambda: {"instruction": word(), "input": word()}])()
        row = prompt | {side: dice.choice([word(), message("assistant")]) for side in ("chosen", "rejected")}
    for name in ("system", "tools", "id", "gt"):
        if dice.random() < 0.3:
            row[name] = [{"name": word()}] if name == "tools" else [word()] if name == "gt" else word()
    return kind, row


def test_every_word_of_a_row_is_kept_or_its_key_named():
    dice, refused, rows = random.Random(0), 0, int(os.environ.get("FUZZ", 500))
    for _ in range(rows):
        word = Words()
        kind, row = marked(dice, word)
        try:
            canonical, unused = normalise(row, kind)
        except ValueError as error:
            assert "system" in str(error) or "beside" in str(error)  # two of what there is one of
            refused += 1
            continue
        kept = json.dumps(canonical)
        for name, value in row.items():
            if name not in unused and not (kind == "pair" and name == "gt"):
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, dict):
                        part = {key: text for key, text in part.items() if f"message.{key}" not in unused}
                    lost = [text for text in re.findall(r"w\d+w", json.dumps(part)) if text not in kept]
                    assert not lost, (row, canonical, unused)
    assert refused < rows / 4
