"""Packing loses no target and wastes little; a file is tokenised once, in small pieces; bad rows are named."""

import errno
import gzip
import itertools
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from dataset import packing, token_cache
from dataset.lm_dataset import SYSTEM_PROMPTS, PretrainDataset, SFTDataset, TokenDataset
from dataset.reader import read_lines
from model.chat import BOS, EOS, ChatTokenizer
from model.cli import UserError
from model.files import open_atomically
from scripts import prepare_data

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared" / "data"
WORDS = ["月亮", "the", "小猫", "of", "1,024", "吃了", "apples", "。", "北京", "is", "😀", "not", "\n", "很", "blue"]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer()


@pytest.fixture
def make(tmp_path, tokenizer):
    """Builds a dataset of rows (objects, or lines as bytes), its cache beside it."""

    def make(kind: type[TokenDataset], rows: list, max_seq_len: int = 64, name: str = "rows.jsonl", **options):
        path = write(tmp_path / name, rows)
        return kind(path, options.pop("tokenizer", tokenizer), max_seq_len, cache_dir=tmp_path / "cache", **options)

    return make


def write(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def random_text(rng: random.Random, longest: int) -> str:
    return "x" + " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def random_texts(seed: int, count: int = 60, longest: int = 60) -> list[dict]:
    rng = random.Random(seed)
    return [{"text": random_text(rng, longest)} for _ in range(count)]


def random_chats(seed: int, count: int = 60, turns: int = 3, longest: int = 8) -> list[dict]:
    """Conversations of up to so many questions and answers, no two alike, one answer in three with reasoning."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        messages = []
        for _ in range(rng.randint(1, turns)):
            answer = {"role": "assistant", "content": random_text(rng, longest)}
            if rng.random() < 1 / 3:
                answer["reasoning_content"] = random_text(rng, longest)
            messages += [{"role": "user", "content": f"{number} {random_text(rng, longest)}"}, answer]
        rows.append({"conversations": messages})
    return rows


def documents(data: TokenDataset) -> list[list[int]]:
    """The ids of each document, in the order of the file."""
    return [ids.tolist() for ids in np.split(data.tokens, np.load(data.folder / "ends.npy")[:-1])]


def batches(data: TokenDataset, size: int = 3):
    """(row numbers, batch) over all rows, in a random order."""
    order = np.random.default_rng(0).permutation(len(data))
    for begin in range(0, len(order), size):
        yield order[begin:begin + size], data.batch(order[begin:begin + size])


def predictions(data: TokenDataset) -> Counter:
    """How often each (token, the target after it, its position) occurs over all rows."""
    counts = Counter()
    for _, batch in batches(data):
        ids, positions = (batch[name].flatten()[batch["logits_indices"]] for name in ("input_ids", "position_ids"))
        counts.update(zip(ids.tolist(), batch["targets"].tolist(), positions.tolist(), strict=True))
    return counts


# ------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("packed", [True, False])
def test_every_token_of_every_text_is_predicted_exactly_once(make, tokenizer, packed):
    rows = random_texts(0) + [{"text": "1" * digits} for digits in (62, 63, 64, 127, 500)]
    expected = Counter()
    for row in rows:
        ids = [BOS, *tokenizer.encode_text(row["text"]), EOS]
        expected.update((ids[i], ids[i + 1], i % 64) for i in range(len(ids) - 1))
    assert max(expected.values()) > 1  # equal predictions are counted, not merged
    data = make(PretrainDataset, rows, packing=packed)
    assert predictions(data) == expected
    assert data.rows.length.min() > 0


@pytest.mark.parametrize("packed", [True, False])
def test_the_answers_of_conversations_and_nothing_else_are_predicted_exactly_once(make, tokenizer, packed):
    rows = random_chats(1)
    expected = Counter()
    for row in rows:
        ids, mask = tokenizer.encode(row["conversations"])
        expected.update((ids[i], ids[i + 1], i) for i in range(len(ids) - 1) if mask[i + 1])
    data = make(SFTDataset, rows, 512, packing=packed, system_prompt_ratio=0, empty_think_ratio=1)
    assert predictions(data) == expected
    assert data.warnings == []


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind, rows", [(PretrainDataset, random_texts(2)), (SFTDataset, random_chats(2))])
def test_bounds_positions_and_attention_mask_agree(make, kind, rows, packed):
    data = make(kind, rows, packing=packed)
    for wanted, batch in batches(data):
        real, positions = batch["attention_mask"].flatten(), batch["position_ids"].flatten()
        bounds = batch["cu_seqlens"].tolist()
        assert batch["cu_seqlens"].numpy().dtype == np.int32
        assert len(bounds) == len(wanted) * (data.max_sequences + 1) + 1
        assert set(bounds) >= {row * 64 for row in range(len(wanted) + 1)}
        for begin, end in itertools.pairwise(bounds):
            assert begin <= end
            if real[begin:end].any():
                assert real[begin:end].all() and positions[begin:end].tolist() == list(range(end - begin))
        assert (batch["input_ids"].flatten()[real == 0] == 0).all()
        assert batch["attention_mask"].sum(1).tolist() == data.num_tokens[wanted].tolist()
        targets_per_row = np.bincount(batch["logits_indices"] // 64, minlength=len(wanted))
        assert targets_per_row.tolist() == data.num_targets[wanted].tolist()
    assert packed == (data.max_sequences > 1)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each row when every length, longest first, goes to the fullest row that takes it."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else capacity) - length)
    return sorted(free)


def test_best_fit_is_best_fit_decreasing():
    rng = random.Random(3)
    for _ in range(100):
        capacity = rng.randint(1, 300)
        lengths = [rng.randint(1, rng.randint(1, capacity)) for _ in range(rng.randint(1, 150))]
        loads = np.bincount(packing.best_fit(np.array(lengths), capacity), lengths)
        assert sorted(capacity - loads) == best_fit_decreasing(lengths, capacity)
        assert loads.max() <= capacity


def test_packing_in_windows_keeps_every_piece_and_fills_no_row_twice(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 7)
    length = np.random.default_rng(4).integers(1, 20, 100)
    start = np.cumsum(length)
    rows = packing.pack(start, length, 20)
    assert sorted(zip(rows.start, rows.length, strict=True)) == sorted(zip(start, length, strict=True))
    loads = np.add.reduceat(rows.length, rows.row_offsets[:-1])
    assert rows.row_offsets[-1] == 100 and loads.max() <= 20 and loads.min() >= 1


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
@pytest.mark.parametrize("kind, name, length", [(PretrainDataset, "pretrain_val", 340), (SFTDataset, "sft_val", 768)])
def test_rows_of_real_text_are_98_percent_full(tmp_path, tokenizer, kind, name, length):
    path = SHARED / f"{name}.jsonl.gz"
    packed, padded = (kind(path, tokenizer, length, packing, cache_dir=tmp_path) for packing in (True, False))
    assert packed.utilization >= 0.98 > padded.utilization
    assert len(padded) == len(padded.rows.start) == len(packed.rows.start) > len(packed)


# ------------------------------------------------------------------------------------------------ long conversations


def test_conversations_end_at_an_answers_end_unless_the_first_is_too_long(make, tokenizer):
    rows = random_chats(5, turns=8, longest=12)
    for digits in (63, 64, 65):  # around the longest first answer that fits
        messages = [{"role": "user", "content": "1" * digits}, {"role": "assistant", "content": "2"}]
        rows.append({"conversations": messages * 2})
    data = make(SFTDataset, rows, 80, packing=False, system_prompt_ratio=0, empty_think_ratio=1)
    shortened = answers_cut = exact = 0
    for row, (start, length) in zip(rows, zip(data.rows.start, data.rows.length, strict=True), strict=True):
        messages = row["conversations"]
        whole = tokenizer.encode(messages)[0]
        candidates = [tokenizer.encode(messages[:n])[0][:-1] for n in range(2, len(messages) + 1, 2)]  # to <|im_end|>
        fitting = [ids for ids in candidates if len(ids) <= 81] or [whole[:81]]
        expected = whole if len(whole) <= 81 else fitting[-1]
        assert data.tokens[start:start + length + 1].tolist() == expected
        shortened += len(whole) > 81
        answers_cut += len(candidates[0]) > 81
        exact += len(candidates[0]) == 81
    assert len(rows) > shortened > answers_cut > 0 < exact
    assert f"{shortened} of {len(rows)} conversations exceed 80 tokens" in data.warnings[0]
    assert data.warnings[0].endswith(f"{answers_cut} first answers are cut")


# ----------------------------------------------------------------------------------------------------- the cache


def forbid_tokenising(monkeypatch):
    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(ChatTokenizer, "encode_segments", refuse)


def test_a_tokenizer_of_more_entries_than_token_files_can_count_is_refused(make, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 65_537)
    with pytest.raises(UserError, match="65,537 entries, but files of tokens hold ids below 65,536"):
        make(PretrainDataset, [{"text": "a"}])
    monkeypatch.setattr(tokenizer, "vocab_size", 65_536)
    assert len(make(PretrainDataset, [{"text": "ab"}])) == 1


def test_the_second_start_reads_the_cache(make, monkeypatch):
    rows = random_chats(6)
    first = make(SFTDataset, rows)
    forbid_tokenising(monkeypatch)
    second = make(SFTDataset, rows)
    for wanted, batch in batches(first):
        assert all(batch[name].equal(tensor) for name, tensor in second.batch(wanted).items())
    assert second.warnings == first.warnings != []
    for options in ({"max_seq_len": 32}, {"packing": False}, {"name": "the_same_in_another_file.jsonl"}):
        assert make(SFTDataset, rows, **options).folder == first.folder


def prepared(tmp_path, rows: list, kind: str = "sft", *flags: str) -> Path:
    """The folder of tokens that scripts/prepare_data.py makes of `rows`, which are gone then, as it is moved."""
    rows, made = write(tmp_path / "to_prepare.jsonl", rows), tmp_path / "tokens"
    with mock.patch.object(sys, "argv", ["prepare_data.py", f"--kind={kind}", f"--data_path={rows}", f"--out={made}",
                                         "--max_seq_len=64", *flags]):
        prepare_data.main()
    rows.unlink()
    assert {path.name for path in tmp_path.iterdir()} <= {"tokens", "rows.jsonl", "cache"}  # nothing else is left
    return Path(shutil.move(made, tmp_path / "carried"))


@pytest.mark.parametrize("length", [64, 32])
def test_a_prepared_folder_is_carried_without_its_file(make, tmp_path, tokenizer, monkeypatch, length):
    rows = random_chats(7)
    first = make(SFTDataset, rows, length)
    folder = prepared(tmp_path, rows)
    forbid_tokenising(monkeypatch)
    second = SFTDataset(folder, tokenizer, length)
    assert second.key == first.key and second.folder == folder  # so that a run goes on with either
    for wanted, batch in batches(first):
        assert all(batch[name].equal(tensor) for name, tensor in second.batch(wanted).items())


def write_other_tokenizer(folder) -> None:
    """Ours without its last merge."""
    layout = json.loads((REPO / "model" / "tokenizer.json").read_text("utf-8"))
    del layout["model"]["merges"][-1]
    (folder / "tokenizer.json").write_text(json.dumps(layout))


def test_a_prepared_folder_is_refused_where_the_file_would_become_other_tokens(tmp_path, tokenizer):
    folder = prepared(tmp_path, random_chats(8), "sft", "--system_prompt_ratio=0.5")
    SFTDataset(folder, tokenizer, 64, system_prompt_ratio=0.5)
    write_other_tokenizer(tmp_path)
    for word, attempt in {"settings": lambda: SFTDataset(folder, tokenizer, 64),
                          "kind": lambda: PretrainDataset(folder, tokenizer, 64),
                          "tokenizer": lambda: SFTDataset(folder, ChatTokenizer(tmp_path), 64, system_prompt_ratio=0.5),
                          "a folder without tokens": lambda: SFTDataset(tmp_path, tokenizer, 64)}.items():
        with pytest.raises(UserError, match=word):
            attempt()


def test_other_content_settings_kind_or_tokenizer_make_another_cache(make, tmp_path):
    rows = random_chats(8)
    write_other_tokenizer(tmp_path)
    made = [make(SFTDataset, rows), make(SFTDataset, [*rows, rows[0]]), make(SFTDataset, rows, seed=1),
            make(SFTDataset, rows, system_prompt_ratio=0.5), make(SFTDataset, rows, empty_think_ratio=0.5),
            make(type("Other", (SFTDataset,), {}), rows), make(SFTDataset, rows, tokenizer=ChatTokenizer(tmp_path))]
    assert len({data.folder for data in made}) == len(made)


def test_an_edited_file_is_read_again(make, tmp_path):
    for text in ("one", "two"):  # of the same size
        assert documents(make(PretrainDataset, [{"text": text}]))[0][1:-1] == ChatTokenizer().encode_text(text)


def test_interrupted_tokenising_leaves_nothing_half_done(make, tmp_path, monkeypatch):
    rows, encode = random_texts(9), ChatTokenizer.encode_texts
    calls = itertools.count(1)

    def interrupt(self, texts):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(token_cache, "CHUNK_CHARS", 1000)
    monkeypatch.setattr(ChatTokenizer, "encode_texts", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(PretrainDataset, rows)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["files"]
    assert len(documents(make(PretrainDataset, rows))) == len(rows)


def test_what_a_killed_process_left_a_day_ago_is_removed_and_tokens_are_for_all_to_read(make, tmp_path):
    rows = random_texts(3)
    folder = make(PretrainDataset, rows).folder
    shutil.rmtree(folder)
    old, new = (folder.with_name(f".{folder.name}.{name}") for name in ("old", "new"))
    for path in (old, new):
        path.mkdir()
        (path / "tokens.bin").write_bytes(bytes(9))
    for path in (old / "tokens.bin", old):
        os.utime(path, (0, 0))
    make(PretrainDataset, rows)
    assert not old.exists() and new.exists()
    if os.name == "posix":
        os.umask(umask := os.umask(0))
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_is_written_whole_or_not_at_all_also_by_two_at_once(tmp_path):
    path = tmp_path / "file"
    with open_atomically(path, shared=True) as one, open_atomically(path, shared=True) as two:
        one.write(b"one")
        two.write(b"second")
    assert path.read_bytes() == b"one"  # renamed last
    with pytest.raises(OSError, match="file: not saved: No space left"), open_atomically(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------ what SFT adds to the rows


def extras(data: SFTDataset, tokenizer: ChatTokenizer) -> dict[str, tuple[bool, int]]:
    """By first question: whether it got a system prompt, and how many think blocks it has."""
    found = {}
    for ids in documents(data):
        text = tokenizer.decode(ids, keep_special_tokens=True)
        question = text.split("<|im_start|>user\n", 1)[1].split("<|im_end|>", 1)[0]
        found[question] = text.startswith("<|im_start|>system"), text.count("<think>")
    return found


def test_extras_depend_on_the_seed_and_the_row_alone(make, tokenizer):
    rows = random_chats(10, count=400, turns=1)
    drawn = extras(make(SFTDataset, rows), tokenizer)
    assert len(drawn) == 400
    assert extras(make(SFTDataset, rows[::-1]), tokenizer) == drawn
    assert extras(make(SFTDataset, rows[7:100]), tokenizer).items() <= drawn.items()
    assert extras(make(SFTDataset, rows, seed=43), tokenizer) != drawn


def test_extras_have_their_ratios(make, tokenizer):
    rows = random_chats(11, count=600, turns=1)
    reasons = {row["conversations"][0]["content"]: "reasoning_content" in row["conversations"][1] for row in rows}
    for system_ratio, think_ratio in ((0.2, 0.2), (0.7, 0.4), (0, 1), (1, 0)):
        data = make(SFTDataset, rows, system_prompt_ratio=system_ratio, empty_think_ratio=think_ratio)
        drawn = extras(data, tokenizer)
        assert np.mean([system for system, _ in drawn.values()]) == pytest.approx(system_ratio, abs=0.06)
        kept = [blocks for question, (_, blocks) in drawn.items() if not reasons[question]]
        assert np.mean(kept) == pytest.approx(think_ratio, abs=0.08)
        assert all(blocks == 1 for question, (_, blocks) in drawn.items() if reasons[question])


@pytest.mark.parametrize("escaped", [True, False])
def test_a_system_prompt_is_added_only_where_there_is_none_and_in_the_rows_language(make, tokenizer, escaped):
    def line(*messages) -> bytes:
        roles = ["system", "user", "assistant"][-len(messages):]
        row = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=True)]
        return json.dumps({"conversations": row}, ensure_ascii=escaped).encode()

    lines = [line("Mine.", "hi", "yo"), line("", "你好", "好"), line("hi", "yo"), line("你好", "好")]
    systems = [tokenizer.decode(ids).split("user\n")[0].removeprefix("system\n").strip("\n")
               for ids in documents(make(SFTDataset, lines, system_prompt_ratio=1))]
    assert systems[:2] == ["Mine.", ""]
    assert systems[2] in SYSTEM_PROMPTS["en"] and systems[3] in SYSTEM_PROMPTS["zh"]


# ------------------------------------------------------------------------------------------------ files and bad rows


def chat(*messages) -> bytes:
    return json.dumps({"conversations": messages}).encode()


GOOD = {"text": "fine", "conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
USER, ASSISTANT = GOOD["conversations"]
BAD_ROWS = {
    "not JSON": (TokenDataset, b"{oops", "not JSON: "),
    "cut off": (TokenDataset, b'{"text": "a', "not JSON: "),
    "nested too deep": (TokenDataset, b"[" * 100_000, "not JSON: "),
    "not UTF-8": (TokenDataset, b'{"text": "\xff"}', "not UTF-8: "),
    "a list": (TokenDataset, b"[1]", "a row must be a JSON object, not list"),
    "a number": (TokenDataset, b"3", "a row must be a JSON object, not int"),
    "half a surrogate pair": (TokenDataset, b'{"text": "\\uD83D"}', "not text: half a surrogate pair"),
    "no text": (PretrainDataset, b'{"txt": "typo"}', 'a pretraining row is {"text": '),
    "text a number": (PretrainDataset, b'{"text": 3}', 'a pretraining row is {"text": '),
    "text empty": (PretrainDataset, b'{"text": " \\n"}', "the text is empty"),
    "no conversations": (SFTDataset, b'{"text": "fine"}', 'a row is {"conversations": [messages]}'),
    "no messages": (SFTDataset, chat(), "conversations is empty; a conversation has one message or more"),
    "messages a text": (SFTDataset, b'{"conversations": "hello"}', "conversations is not JSON: "),
    "a message a text": (SFTDataset, chat(USER, "hello"), "a message must be an object"),
    "no assistant": (SFTDataset, chat(USER), "no message of the assistant's"),
    "unknown role": (SFTDataset, chat(USER, ASSISTANT, {"role": "bot"}), "message 3: unknown role 'bot'"),
    "bad content": (SFTDataset, chat(USER, {**ASSISTANT, "content": 3}), "message 2: content must be text, not int"),
    "bad tools": (SFTDataset, chat({**USER, "tools": "[{"}, ASSISTANT), "message 1: tools is not JSON: "),
    "bad calls": (SFTDataset, chat(USER, {**ASSISTANT, "tool_calls": "[3]"}), "message 2: a tool call must be "),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line_or_left_out(make, tmp_path, name):
    reader, line, words = BAD_ROWS[name]
    for kind in [PretrainDataset, SFTDataset] if reader is TokenDataset else [reader]:
        options = {} if kind is PretrainDataset else {"system_prompt_ratio": 1}
        for skipped in (False, True, False):  # leaving rows out hides nothing from a later run
            if skipped:
                data = make(kind, [GOOD, line, GOOD], skip_bad_rows=True, **options)
                assert data.meta["documents"] == 2
                assert data.warnings[0].startswith(f"skipped 1 bad rows of {data.path}, the first: line 2: {words}")
            else:
                with pytest.raises(UserError) as caught:
                    make(kind, [GOOD, line, GOOD], **options)
                assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
                assert words in str(caught.value) and "\n" not in str(caught.value)
                assert str(caught.value).endswith("(--skip_bad_rows 1 leaves such rows out)")


def test_skipped_rows_are_counted_and_the_first_five_named(make, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK_CHARS", 20)
    data = make(PretrainDataset, [GOOD, b"[1]", b"x", b"[1]", GOOD, b"3", b"{", b" ", b"{}"], skip_bad_rows=True)
    assert data.warnings[0].startswith("skipped 6 bad rows")
    assert re.findall(r"line (\d+): ", data.warnings[0]) == ["2", "3", "4", "6", "7"]


@pytest.mark.parametrize("rows, options", [([b""], {}), ([b"", b"{}"], {"skip_bad_rows": True})])
def test_a_file_without_a_usable_row_is_an_error(make, rows, options):
    with pytest.raises(UserError, match="rows.jsonl: no usable row in it"):
        make(PretrainDataset, rows, **options)


def test_a_missing_file_is_an_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        PretrainDataset(tmp_path / "absent.jsonl", tokenizer, 64, cache_dir=tmp_path)
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        next(read_lines(tmp_path / "absent.jsonl"))


def damage(content: bytes, kind: str) -> bytes:
    middle = len(content) // 2
    return {"truncated": content[:middle], "wrong checksum": content[:-8] + bytes(8),
            "overwritten": content[:middle] + b"\xff" * 500 + content[middle + 500:]}[kind]


@pytest.mark.parametrize("kind", ["truncated", "wrong checksum", "overwritten"])
def test_a_damaged_gz_file_is_named_with_the_line_where_reading_stopped(tmp_path, tokenizer, kind):
    path = write(tmp_path / "rows.jsonl.gz", random_texts(13, count=3000))
    path.write_bytes(damage(path.read_bytes(), kind))
    read = []
    with pytest.raises(UserError) as caught:
        read.extend(read_lines(path))
    assert str(caught.value).startswith(f"{path}:{len(read) + 1}: cannot be read: ") and "\n" not in str(caught.value)
    assert read
    with pytest.raises(UserError, match="cannot be read"):
        PretrainDataset(path, tokenizer, 64, skip_bad_rows=True, cache_dir=tmp_path / "cache")
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["files"]


def test_gz_and_plain_give_the_same_tokens(make):
    rows = random_texts(14)
    plain, packed = (documents(make(PretrainDataset, rows, name=name)) for name in ("rows.jsonl", "rows.jsonl.gz"))
    assert plain == packed


def test_a_long_file_is_tokenised_a_little_at_a_time(monkeypatch):
    def long_file(path, parse, report, kind):
        yield from enumerate(itertools.repeat([[("x", True)]], 100_000), 1)
        pytest.fail("read to the end")

    monkeypatch.setattr(token_cache, "CHUNK_CHARS", 1000)
    monkeypatch.setattr(token_cache, "read_rows", long_file)
    for documents in itertools.islice(token_cache.read_documents(Path("rows.jsonl"), None, "", None), 5):
        assert len(documents) == 1001
