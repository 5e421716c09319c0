"""The tokenizer in model/ keeps its promises, and scripts/train_tokenizer.py makes another one like it."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dataset.reader import read_rows
from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import UserError, run_main
from model.weights import find_tokenizer
from scripts import train_tokenizer

REPO = Path(__file__).resolve().parent.parent
VALIDATION = REPO.parent / "shared" / "data" / "pretrain_val.jsonl.gz"

# The contract, spelt out here rather than imported: other programs and published weights rely on these ids.
HIDDEN = {
    0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 3: "<|object_ref_start|>", 4: "<|object_ref_end|>",
    5: "<|box_start|>", 6: "<|box_end|>", 7: "<|quad_start|>", 8: "<|quad_end|>", 9: "<|vision_start|>",
    10: "<|vision_end|>", 11: "<|vision_pad|>", 12: "<|image_pad|>", 13: "<|video_pad|>", 14: "<|audio_start|>",
    15: "<|audio_end|>", 16: "<|audio_pad|>", 17: "<tts_pad>", 18: "<tts_text_bos>", 19: "<tts_text_eod>",
    20: "<tts_text_bos_single>",
}  # fmt: skip
SHOWN = {
    21: "<tool_call>", 22: "</tool_call>", 23: "<tool_response>", 24: "</tool_response>", 25: "<think>",
    26: "</think>", 27: "<|buffer1|>", 28: "<|buffer2|>", 29: "<|buffer3|>", 30: "<|buffer4|>", 31: "<|buffer5|>",
    32: "<|buffer6|>", 33: "<|buffer7|>", 34: "<|buffer8|>", 35: "<|buffer9|>",
}  # fmt: skip
CONTRACT = HIDDEN | SHOWN

# https://huggingface.co/Qwen/Qwen2-7B/blob/main/tokenizer.json
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MIXED_TEXTS = [
    "I'm sure they'LL say we've won; he'd better not. Don't stop -- it's 3:45pm, 50% off ($1,299.00)!",
    "小明有12个苹果,吃了3个。还剩几个？答:9个!\n\n第二行　全角空格，Qwen2模型—很好……",
    "def f(x_1: int = 0x1F) -> str:\n\treturn f'{x_1!r:>8}'  # 注释\r\n\r\n    if a[i] != b: pass\n",
    '{"name": "calculate", "arguments": {"expression": "(12+345)*6/7.5"}}\n',
    "  two leading, trailing \t \n   \n\n x\u00a0y\u3000z   ",
    "naïve café Straße Ελλάδα Привет شكراً नमस्ते ไทย ２０２６ ½ Ⅷ ①",
    "https://example.com/a?b=1&c=%20#d  e-mail: a.b@c.org 👩‍👩‍👧‍👦🇨🇳✅!!!\n",
]
AWKWARD_TEXTS = [
    "",
    " ",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇳🏴\U000e0067\U000e0062\U000e007f ❤️",  # joiners, skin tones, flags, variation selectors
    "𝒜𝓑 𠀀𠮷 😀 \U0010fffd \U0001f9ff",  # beyond the basic plane
    "e\u0301 Z\u0351\u036b\u0343\u036a a\u0323\u0307 각 가",  # combining marks, conjoining jamo
    "line\r\nline\rline\n\n\r\n \t\v\f\x1c\x85\u2028\u2029end",
    "שלום \u202bעולם\u202c مرحبا\u200f بالعالم \u2067x\u2069",
    "\ufeffbom \u200bzero\u200cwidth\u200d \xad \ufffd \uffff",
    "don 't . , ! ? do n't I 'm it 's",  # what clean_up_tokenization_spaces would spoil
    "<|im_end> <think <|buffer10|> </ tool_call>",  # nearly added tokens
    *MIXED_TEXTS,
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(REPO / "model"), local_files_only=True)


@pytest.fixture(scope="module")
def core():
    return Tokenizer.from_file(str(REPO / "model" / "tokenizer.json"))


def random_texts(count: int, seed: int) -> list[str]:
    """Random strings of all kinds of characters, every plane included, surrogates (not text) left out."""
    rng = random.Random(seed)
    ranges = [(0x20, 0x7E), (0x0, 0x1F), (0x80, 0x24F), (0x300, 0x36F), (0x590, 0x6FF), (0x900, 0xDFF)]
    ranges += [(0x1100, 0x11FF), (0x2000, 0x206F), (0x2E80, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF)]
    ranges += [(0x1F000, 0x1FAFF), (0x10000, 0x10FFFF)]

    def character() -> str:
        return rng.choice(" \n\r'1aé中") if rng.random() < 0.3 else chr(rng.randint(*rng.choice(ranges)))

    return ["".join(character() for _ in range(rng.randint(1, 40))) for _ in range(count)]


# ------------------------------------------------------------------------------------------ the tokenizer in model/


def test_round_trip_is_exact(tokenizer, core):
    bytes_as_text = [chr(i) for i in range(256)]
    texts = AWKWARD_TEXTS + bytes_as_text + ["".join(bytes_as_text)] + random_texts(3000, seed=0)
    assert all(core.decode(core.encode(text).ids) == text for text in texts)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


def test_every_byte_has_an_entry(core):
    # Byte-level BPE writes a byte as one printable character; those of "Ā".."Ń" stand for the unprintable 68.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(i) for i in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    assert sorted(core.token_to_id(byte) for byte in alphabet) == list(range(36, 292))


def test_added_tokens_have_their_ids(tokenizer, core):
    assert core.get_vocab_size() == len(tokenizer) == 6400
    assert {i: core.id_to_token(i) for i in range(36)} == CONTRACT
    added = core.get_added_tokens_decoder()
    assert {i: token.content for i, token in added.items()} == CONTRACT
    assert {i for i, token in added.items() if token.special} == set(HIDDEN)
    assert not any(t.normalized or t.lstrip or t.rstrip or t.single_word for t in added.values())
    for i, token in CONTRACT.items():
        before, after = core.encode("中a ").ids, core.encode(" 1b").ids
        assert core.encode(f"中a {token} 1b").ids == [*before, i, *after] == tokenizer.encode(f"中a {token} 1b")


def test_tool_and_thinking_tags_survive_skip_special_tokens(tokenizer, core):
    ids = list(CONTRACT)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(SHOWN.values())
    assert core.decode(ids, skip_special_tokens=True) == "".join(SHOWN.values())


def test_loads_with_auto_tokenizer_unchanged(tokenizer, core):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0)
    assert tokenizer.model_max_length == 32768
    assert tokenizer("hello").input_ids == core.encode("hello").ids  # nothing is put before or behind
    loaded, stored = json.loads(tokenizer.backend_tokenizer.to_str()), json.loads(core.to_str())
    for part in ("normalizer", "pre_tokenizer", "model", "decoder", "added_tokens"):
        assert loaded[part] == stored[part], part


def test_split_is_qwen2s(core):
    for text in MIXED_TEXTS:
        pieces = [text[start:end] for _, (start, end) in core.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == regex.findall(QWEN2_SPLIT, text)
    state = json.loads(core.to_str())["pre_tokenizer"]["pretokenizers"]
    assert state[0] == {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    assert (state[1]["add_prefix_space"], state[1]["use_regex"]) == (False, False)


@pytest.mark.skipif(not VALIDATION.is_file(), reason=f"{VALIDATION} is not here")
def test_compression_reaches_its_targets(core):
    """At least 1.2 characters a token on Chinese rows and 3.2 on English (published tokenizer: 1.017 and 2.951)."""
    with gzip.open(VALIDATION, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    chinese = [text for text in texts if len(regex.findall(r"\p{Han}", text)) > 0.2 * len(text)]
    english = [text for text in texts if len(regex.findall(r"\p{Han}", text)) <= 0.2 * len(text)]
    assert len(chinese) > 100 and len(english) > 100
    for rows, target in ((chinese, 1.2), (english, 3.2)):
        assert sum(map(len, rows)) / sum(map(len, core.encode_batch(rows))) >= target


# ----------------------------------------------------------------------------------------------- the training script


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs the script in this process. → exit status, what it printed, what it complained about."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *map(str, arguments)])
        status = 0
        try:
            run_main(train_tokenizer.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def write_rows(path: Path, rows: list[dict]) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Every field holds a word of its own; a trainer that reads the field makes the word one token.
ROWS = {
    "pretrain.jsonl": {"text": "pretext"},
    "sft.jsonl.gz": {
        "conversations": [
            {"role": "system", "content": "systemword", "tools": '[{"name": "toolstring"}]'},
            {"role": "system", "content": "", "tools": [{"name": "工具名称"}]},
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": None, "reasoning_content": "reasoning", "tool_calls": '["callword"]'},
            {"role": "assistant", "content": "answer", "tool_calls": [{"name": "callobject"}]},
        ]
    },
    "dpo.jsonl": {
        "chosen": [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": "goodone"}],
        "rejected": [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": "badone"}],
    },
    "agent.jsonl": {"conversations": [{"role": "user", "content": "agentask"}], "gt": ["groundtruth"]},
}
READ = "pretext systemword toolstring 工具名称 question reasoning callword answer callobject prompt goodone badone"
READ += " agentask"
NOT_READ = "conversations reasoning_content assistant groundtruth"


def test_training_reads_every_row_format_and_repeats_itself(tmp_path, core, run_script, monkeypatch):
    files = [write_rows(tmp_path / name, [row] * 20) for name, row in ROWS.items()]
    val = write_rows(tmp_path / "val.jsonl", [{"text": "an answer, a question"}, {"text": "工具名称是answer"}])
    with open(files[0], "a", encoding="utf-8") as file:
        file.write("\n")  # a blank line is no row
    produced = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        status, printed, complaint = run_script(
            "--data_path", *files, "--vocab_size", 420, "--tokenizer_dir", "new/dir", "--val_data_path", val
        )
        assert (status, complaint) == (0, "")
        directory = tmp_path / place / "new" / "dir"
        produced.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert produced[0] == produced[1]
    assert set(produced[0]) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

    small = Tokenizer.from_str(produced[0]["tokenizer.json"].decode())
    assert all(len(small.encode(word)) == 1 for word in READ.split())
    assert all(len(small.encode(word)) > 1 for word in NOT_READ.split())

    for language, text in (("English", "an answer, a question"), ("Chinese", "工具名称是answer")):
        tokens = len(small.encode(text))
        expected = f"{len(text) / tokens:.3f} characters per token, {len(text.encode()) / tokens:.3f} bytes per token"
        assert f"{language} rows: {expected}" in printed

    # The tokenizer in model/ is what this script makes: the two differ in what was learnt and nowhere else.
    new, shipped = json.loads(small.to_str()), json.loads(core.to_str())
    assert {**new, "model": None} == {**shipped, "model": None}
    assert {**new["model"], "vocab": 0, "merges": 0} == {**shipped["model"], "vocab": 0, "merges": 0}
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert produced[0][name] == (REPO / "model" / name).read_bytes()


def test_every_takes_every_nth_row(tmp_path, run_script):
    words = ["keepme", "dropme", "skipme"] * 20
    data = write_rows(tmp_path / "rows.jsonl", [{"text": word} for word in words])
    assert run_script("--data_path", data, "--every", 3, "--tokenizer_dir", tmp_path / "t")[0] == 0
    small = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    assert [len(small.encode(word)) == 1 for word in words[:3]] == [True, False, False]
    data.write_text("\n".join(data.read_text().splitlines(keepends=True)))  # rows count, not lines
    assert run_script("--data_path", data, "--every", 3, "--tokenizer_dir", tmp_path / "again")[0] == 0
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "t/tokenizer.json").read_bytes()


def test_default_directory_does_not_depend_on_the_current_one(tmp_path):
    command = [sys.executable, str(REPO / "scripts" / "train_tokenizer.py"), "--help"]
    environment = os.environ | {"COLUMNS": "400", "PYTHONUTF8": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=True)
    assert f"default: {REPO / 'model'}" in result.stdout


GOOD = b'{"text": "fine"}\n'
BAD_FILES = {
    "not_json.jsonl": (GOOD + b"{oops\n" + GOOD, "not_json.jsonl:2: not JSON"),
    "no_text.jsonl": (GOOD + b'{"txt": "typo"}\n', "no_text.jsonl:2: no text in a field that is known; this row"),
    "messages.jsonl": (b'{"conversations": [{"role": "user"}]}\n', "messages.jsonl:1: no text in a field"),
    "too_few.jsonl": (b'{"text": "a"}\n', "no two characters follow each other twice"),
    "absent.jsonl": (None, "absent.jsonl: no such file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_line_and_status_2(tmp_path, run_script, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, _, complaint = run_script("--data_path", tmp_path / name, "--tokenizer_dir", tmp_path / "t")
    assert status == 2
    assert complaint.startswith("error: ") and complaint.count("\n") == 1 and message in complaint
    assert not (tmp_path / "t" / "tokenizer.json").exists()


def test_without_arguments_it_writes_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "ROOT", tmp_path)
    (tmp_path / "dataset").mkdir()
    write_rows(tmp_path / "dataset/sft_t2t_mini.jsonl", [{"text": "again and again " * 9}])
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py"])
    run_main(train_tokenizer.main)
    assert {path.name for path in (tmp_path / "model_learn_tokenizer").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


BAD_FLAGS = [("vocab_size", 291, 2), ("vocab_size", 65_537, 2), ("every", 0, 2), ("val_data_path", "absent", 2),
             ("tokenizer_dir", "a_file", 1), ("tokenizer_dir", TOKENIZER_DIR, 2), ("tokenizer_dir", "a_model", 2)]


@pytest.mark.parametrize("flag, value, status", BAD_FLAGS)
def test_bad_flags_are_said_before_training(tmp_path, run_script, monkeypatch, flag, value, status):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}])
    (tmp_path / "a_file").touch()
    (tmp_path / "a_model").mkdir()
    (tmp_path / "a_model" / "tokenizer.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_tokenizer, "train", lambda *_: pytest.fail("trained"))
    stopped, _, complaint = run_script("--data_path", data, "--tokenizer_dir", "t", f"--{flag}", value)
    assert (stopped, complaint.count("\n")) == (status, 1) and complaint.startswith("error: ")


# -- tiktoken, where it is installed, gives the same ids ---------------------------------------------------------------


@pytest.fixture
def both() -> tuple[ChatTokenizer, ChatTokenizer]:
    """Our tokenizer with tiktoken and without."""
    pytest.importorskip("tiktoken")
    fast, slow = ChatTokenizer(), ChatTokenizer()
    slow._tiktoken = None
    assert fast._tiktoken
    return fast, slow


def test_tiktoken_gives_the_same_ids_for_every_character(both):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    fast, slow = both
    texts = ["".join(f"a{character}1 {character}'s{character}\n" for character in characters[i:i + 999])
             for i in range(0, len(characters), 999)]  # beside letters, numbers, blanks and others
    assert fast.encode_texts(texts) == slow.encode_texts(texts)


def test_tiktoken_gives_the_same_ids_for_any_text(both):
    fast, slow = both
    long_texts = [" " * 10**5, "a" * 10**5, "你a" * 10**4, " \n" * 10**5 + "x"]
    for texts in (random_texts(3000, seed=1), MIXED_TEXTS, AWKWARD_TEXTS, list(CONTRACT.values()), long_texts):
        assert fast.encode_texts(texts) == slow.encode_texts(texts)


@pytest.mark.skipif(not VALIDATION.exists(), reason="no shared data")
def test_tiktoken_gives_the_same_ids_for_real_text(both):
    fast, slow = both
    texts = [row["text"] for _, row in read_rows(VALIDATION)]
    assert fast.encode_texts(texts) == slow.encode_texts(texts)


def swap_merges(layout: dict) -> None:
    merges = layout["model"]["merges"]
    merges[300], merges[5000] = merges[5000], merges[300]


def merge_other_parts(layout: dict) -> None:
    """Make a token of two parts that are never neighbours, because its bytes are merged into two others before."""
    merges, vocab = layout["model"]["merges"], layout["model"]["vocab"]
    for number, (left, right) in enumerate(merges):
        token = left + right
        for cut in range(1, len(token)):
            parts = [token[:cut], token[cut:]]
            if cut != len(left) and all(vocab.get(part, vocab[token]) < vocab[token] for part in parts):
                merges[number] = parts
                return


@pytest.mark.parametrize("change", [
    swap_merges, merge_other_parts, lambda layout: layout.update(normalizer={"type": "Lowercase"}),
    lambda layout: layout["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")])
def test_a_tokenizer_that_tiktoken_would_read_otherwise_keeps_its_own_library(tmp_path, change):
    pytest.importorskip("tiktoken")
    layout = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text("utf-8"))
    change(layout)
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    assert ChatTokenizer(tmp_path)._tiktoken is None


def test_a_million_spaces_in_a_row_are_tokenised():  # at which tiktoken panics
    tokenizer, text = ChatTokenizer(), "a" + " " * 1_000_000 + "b"
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1", "[]",
                                     '{"model": {"type": "WordPiece", "vocab": {}}, "added_tokens": []}'])
def test_a_tokenizer_of_another_kind_is_refused_by_name_and_passed_over_in_a_search(tmp_path, content):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="bert/tokenizer.json: not a tokenizer of byte-level BPE"):
        ChatTokenizer(tmp_path / "bert")
    assert find_tokenizer("0" * 16, tmp_path / "pretrain_64.pth", {}) is None
