r"""Train the tokenizer: a byte-level BPE in which every text has an exact spelling, so nothing is ever "unknown".

Text is cut by Qwen2's rule into words, runs of letters, single digits and punctuation; each piece becomes UTF-8 bytes;
the commonest neighbouring pair is then merged into a new entry, again and again, until the vocabulary is full
(Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). Merges never cross a cut. Digits stay single because a
small model learns arithmetic only if a number is always spelt the same way.

The tokenizer in model/ was made in 80 s and 2.6 GiB of memory (every row instead: 250 s, 6.9 GiB, the same ratios) by

    python scripts/train_tokenizer.py --data_path ../shared/data/pretrain.jsonl.gz ../shared/data/sft.jsonl.gz \
        --every 3 --val_data_path ../shared/data/pretrain_val.jsonl.gz --tokenizer_dir FOLDER
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.formats import ALIASES, ANSWER_KEYS, FORMATS, list_keys
from dataset.reader import parse_row, read_lines
from model.chat import TOKENIZER_DIR
from model.cli import Parser, UserError, positive_int, run_main, whole_number
from model.files import write_atomically
from model.weights import ROOT

# The position is the token id, and weights depend on it: append nothing, reorder nothing.
CONTROL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>",
    "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
]  # fmt: skip
# Part of the model's answers, so decoding with skip_special_tokens=True must keep them.
VISIBLE_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
VISIBLE_TOKENS += [f"<|buffer{i}|>" for i in range(1, 10)]
ADDED_TOKENS = CONTROL_TOKENS + VISIBLE_TOKENS

# Qwen2's rule, letter for letter: engines that know "qwen2" (llama.cpp and others) then cut text exactly as we do.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
FIELDS = {field for _, needed, optional in FORMATS.values() for field in (*needed, *optional)}
FIELDS |= {*ANSWER_KEYS, *ALIASES, "system", "tools", "functions"}


def texts_of(value: object) -> Iterator[str]:
    """Every text that a model would read in a row of any format (see dataset/formats.py), or in a part of one."""
    if isinstance(value, str):
        yield value
    for part in value if isinstance(value, list) else ():
        yield from texts_of(part)
    for name in value if isinstance(value, dict) else ():
        if name in ("tools", "tool_calls", "functions", "function_call") and value[name]:
            yield value[name] if isinstance(value[name], str) else json.dumps(value[name], ensure_ascii=False)
        elif name in FIELDS and name not in ("role", "from"):
            yield from texts_of(value[name])


def read_texts(path: Path, every: int = 1) -> Iterator[list[str]]:
    """The texts of every `every`-th row of a data file, one row at a time."""
    for row_number, (number, line) in enumerate(read_lines(path)):
        if row_number % every:
            continue
        try:
            row = parse_row(line)
            texts = list(filter(None, texts_of(row)))
            if not texts:
                raise ValueError(f"no text in a field that is known; this row has {list_keys(row)}")
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        yield texts


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learn the merges. Memory grows with the number of different pieces in the text, not with its length.

    The same texts give the same tokenizer, byte for byte. Fewer entries than `vocab_size` come back if the text has
    too few different pairs that occur twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, seen or not: any text can be spelt
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in ADDED_TOKENS]))

    state = json.loads(tokenizer.to_str())  # the trainer marks all its tokens special; only the control tokens are
    for token in state["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(state))


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(directory)` understands."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "add_bos_token": False,
              "add_eos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
              "model_max_length": 32768}
    files = {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}
    for name, content in files.items():
        write_atomically(directory / name, f"{content}\n")
    template = TOKENIZER_DIR / "chat_template.jinja"
    if directory.resolve() != TOKENIZER_DIR:
        shutil.copyfile(template, directory / template.name)


def measure(tokenizer: Tokenizer, path: Path) -> dict[str, tuple[float, float]]:
    """Return {"Chinese": (characters, bytes) per token, "English": …}; a Chinese row is over 20% Han characters."""
    totals: dict[str, list[int]] = {"Chinese": [0, 0, 0], "English": [0, 0, 0]}
    for texts in read_texts(path):
        characters = sum(map(len, texts))
        han = sum(len(HAN.findall(text)) for text in texts)
        total = totals["Chinese" if han > 0.2 * characters else "English"]
        total[0] += characters
        total[1] += sum(len(text.encode()) for text in texts)
        total[2] += sum(len(encoding) for encoding in tokenizer.encode_batch(texts))
    return {language: (c / n, b / n) for language, (c, b, n) in totals.items() if n}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, nargs="+", default=[ROOT / "dataset/sft_t2t_mini.jsonl"],
                        help="rows of any format in dataset/formats.py (default: dataset/sft_t2t_mini.jsonl)")
    parser.add_argument("--val_data_path", type=Path, help="held-out rows to measure compression on")
    parser.add_argument("--tokenizer_dir", type=Path, default=ROOT / "model_learn_tokenizer",
                        help="folder to write (default: %(default)s)")
    parser.add_argument("--vocab_size", type=whole_number(1, 65_536), default=6400,
                        help="entries, added tokens and bytes included")
    parser.add_argument("--every", type=positive_int, default=1, help="take every N-th row of each training file")
    args = parser.parse_args()
    if args.vocab_size < (minimum := len(ADDED_TOKENS) + 256):
        raise UserError(f"--vocab_size must be at least {minimum}: the added tokens and the bytes")
    folder = args.tokenizer_dir
    if (folder / "tokenizer.json").exists():
        raise UserError(f"--tokenizer_dir {folder}: there is a tokenizer.json in it, which weights may need; move it "
                        "away first, or name another folder")
    for path in [*args.data_path, *([args.val_data_path] if args.val_data_path else [])]:
        if not path.is_file():  # checked now rather than after minutes of training
            raise UserError(f"{path}: no such file")
    args.tokenizer_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    texts = (text for path in args.data_path for row in read_texts(path, args.every) for text in row)
    tokenizer = train(texts, args.vocab_size)
    entries, seconds = tokenizer.get_vocab_size(), time.perf_counter() - start
    if entries == minimum < args.vocab_size:
        raise UserError("no two characters follow each other twice in these texts: give more of them")
    save(tokenizer, args.tokenizer_dir)
    print(f"{entries:,} of {args.vocab_size:,} entries in {seconds:.0f} s -> {args.tokenizer_dir}")
    if args.val_data_path:
        for language, (characters, size) in measure(tokenizer, args.val_data_path).items():
            print(f"{language} rows: {characters:.3f} characters per token, {size:.3f} bytes per token")


if __name__ == "__main__":
    run_main(main)
