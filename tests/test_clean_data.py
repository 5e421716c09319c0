"""Cleaning drops what is broken, repetitive or there already, says why, and does the same again."""

import json
import random
import sys
from unittest import mock

import pytest

from model.cli import Failure, UserError
from scripts import prepare_data
from scripts.lib import clean_data

pytest.importorskip("datasketch")


def words(seed: int, count: int = 200) -> list[str]:
    return [f"w{number}" for number in random.Random(seed).choices(range(5000), k=count)]


def clean(path, out, *flags: str) -> list[int]:
    """The ids of the rows that stay."""
    with mock.patch.object(sys, "argv", ["prepare_data.py", "--clean", str(path), "--out", str(out), *flags]):
        prepare_data.main()
    return [json.loads(line)["id"] for line in out.read_text("utf-8").splitlines()]


def test_what_goes_and_why(tmp_path, capsys):
    base = words(0)
    near = [*base[:100], "changed", *base[101:]]  # 5 of 196 5-grams are others
    half = base[:100] + words(1, 100)
    texts = [" ".join(base), " ".join(base).upper(), " ".join(near), " ".join(half), "short", "x" * 101_000,
             "It isnâ€™t a good text", "锟斤拷锟斤拷 is not good", "again and " * 60,
             " ".join([*words(2, 60), *words(3, 20) * 3]),
             "你好，很高兴认识你。" * 20, "你好你好，认识你很高兴。", " ".join(words(4))]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(texts)]
    path.write_text("\n".join([*lines, "oops"]))
    assert clean(path, tmp_path / "out.jsonl", "--max_chars", "100000") == [0, 3, 11, 12]
    report = capsys.readouterr().out
    assert "4 of 14 rows stay" in report
    for line in ("1 exact duplicates\n    row 2, line 2 (as row 1): ",
                 "1 near duplicates\n    row 3, line 3 (as row 1): ",
                 "1 too short", "1 too long", "2 mojibake", "3 repetition", "1 unreadable\n    row 14, line 14: oops"):
        assert line in report
    assert clean(path, tmp_path / "again.jsonl", "--max_chars", "100000") == [0, 3, 11, 12]
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        clean(path, tmp_path / "out.jsonl")
    with pytest.raises(SystemExit):
        clean(path, path)
    assert "is what --clean reads" in capsys.readouterr().err
    with pytest.raises(UserError, match="no row of 14 stays, most as too short"):
        clean(path, tmp_path / "none.jsonl", "--min_chars", "200000")
    assert not (tmp_path / "none.jsonl").exists()


def test_the_more_is_shared_the_surer_it_is_found(tmp_path):
    """1 - (1 - s^8)^14 at similarity s of the sets of 5-grams."""
    found = {}
    for share in (0.5, 0.9):
        rows = []
        for seed in range(40):
            base = words(seed)
            kept = int(len(base) * 2 * share / (1 + share))  # |A ∩ B| / |A ∪ B| = share
            rows += [base, base[:kept] + words(1000 + seed, len(base) - kept)]
        path = tmp_path / f"{share}.jsonl"
        path.write_text("".join(json.dumps({"text": " ".join(row), "id": n}) + "\n" for n, row in enumerate(rows)))
        found[share] = len(rows) - len(clean(path, tmp_path / f"{share}.out"))
    assert found[0.5] <= 8 and found[0.9] >= 38  # 5% and 99.9% of 40 are expected


def test_a_pair_repeats_its_prompt_without_harm(tmp_path):
    prompt = {"role": "user", "content": " ".join(words(5))}
    row = {side: [prompt, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"id": 0}))
    assert clean(tmp_path / "rows.jsonl", tmp_path / "out.jsonl") == [0]


def test_without_datasketch_it_says_how_to_get_it(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a text that is long enough"}))
    clean_data.new_minhash.cache_clear()
    with mock.patch.dict(sys.modules, {"datasketch": None}), pytest.raises(Failure, match="pip install datasketch"):
        clean(tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
