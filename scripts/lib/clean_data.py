"""Clean a data file as published recipes do: drop rows that are broken, repetitive, or (nearly) there already.

1. Rows that cannot be read, and texts of fewer or more characters than the limits.
2. Mojibake: characters that only a wrong decoding leaves.
3. Repetition (Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1): the commonest 2-, 3- or 4-gram, or all
   5- to 10-grams that occur before, make up more of the text than their share. A unit is a word or a Chinese character.
4. Exact duplicates (case and blanks aside) and near ones (Lee et al. 2022; Penedo et al. 2024, FineWeb,
   https://arxiv.org/abs/2406.17557): MinHash of 5-grams, 14 bands of 8 hashes, of which one is that of an earlier row.
   Two texts whose 5-grams have a Jaccard similarity of 0.75 are found with probability 0.77, at 0.9 with 0.9996.

The first of several duplicates is kept. The file is read twice; a row takes 120 bytes of a temporary file and about 60
of memory.
"""

import hashlib
import re
import tempfile
from array import array
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from dataset.reader import parse_row, read_lines, unpacked_size
from dataset.token_cache import Progress
from model.cli import Failure, UserError
from model.files import open_atomically
from scripts.train_tokenizer import texts_of

REASONS = ("", "unreadable", "too short", "too long", "mojibake", "repetition", "exact duplicates", "near duplicates")
KEEP, UNREADABLE, SHORT, LONG, MOJIBAKE, REPETITION, EXACT, NEAR = range(len(REASONS))
MOJIBAKE_PATTERN = re.compile("\ufffd|Ã[\x80-\xbf©¨¤¶¼±³]|â€|ï¿½|ï»¿|锟斤拷|烫烫烫|屯屯屯")
UNIT = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]|[^\\W\u3400-\u4dbf\u4e00-\u9fff]+")
TOP_SHARES = {2: 0.20, 3: 0.18, 4: 0.16}  # of the characters, at most in the commonest n-gram
REPEATED_SHARES = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # and in n-grams that occur before
BANDS, HASHES = 14, 8
MIN_UNITS = 50  # shorter texts repeat themselves without harm
EXAMPLES = 3


def clean(path: Path, out: Path, min_chars: int, max_chars: int) -> None:
    """Write the rows of `path` that stay to `out`, one per line, and print what went and why, with examples.

    Raises UserError when `out` exists, or when no row stays.
    """
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or name another file")
    reasons, earlier = array("B"), array("q")  # of each row: why it goes, and the row that it repeats, if any
    progress, num_bytes = Progress(f"reading {path.name}", unpacked_size(path)), 0
    with tempfile.TemporaryFile() as file:
        for row, (_, line) in enumerate(read_lines(path)):
            text, reason = read_text_of(line, min_chars, max_chars)
            reasons.append(reason)
            earlier.append(row)
            if reason == KEEP:
                fingerprints(text).tofile(file)
            num_bytes += len(line)
            progress.update(num_bytes)
        file.flush()
        rows = np.flatnonzero(np.frombuffer(reasons, np.uint8) == KEEP)
        if len(rows):
            keys = np.memmap(file, np.uint64, "r", shape=(len(rows), 1 + BANDS))
            mark_duplicates(keys, rows, np.frombuffer(reasons, np.uint8), np.frombuffer(earlier, np.int64))
    counts = Counter(reasons)
    if not counts[KEEP]:
        commonest = f", most as {REASONS[counts.most_common(1)[0][0]]}" if counts else ""
        raise UserError(f"{path}: no row of {len(reasons):,} stays{commonest}; --min_chars and --max_chars bound texts")
    examples = defaultdict(list)
    with open_atomically(out) as cleaned:
        for row, (number, line) in enumerate(read_lines(path)):
            if (reason := reasons[row]) == KEEP:
                cleaned.write(line.rstrip(b"\r\n") + b"\n")
            elif len(examples[reason]) < EXAMPLES:
                other = f" (as row {earlier[row] + 1:,})" if earlier[row] < row else ""
                examples[reason].append(f"row {row + 1:,}, line {number:,}{other}: "
                                        f"{line.decode('utf-8', 'replace').strip():.100}")
    print(f"{out}: {counts.pop(KEEP):,} of {len(reasons):,} rows stay")
    for reason, count in counts.most_common():
        print(f"{count:,} {REASONS[reason]}", *examples[reason], sep="\n    ")


def read_text_of(line: bytes, min_chars: int, max_chars: int) -> tuple[str, int]:
    """The text of a row, and why it goes by itself."""
    try:
        texts = list(texts_of(parse_row(line)))
    except ValueError:
        return "", UNREADABLE
    text = "\n".join(texts)
    if len(text.strip()) < min_chars:
        return text, SHORT
    if len(text) > max_chars:
        return text, LONG
    if MOJIBAKE_PATTERN.search(text):
        return text, MOJIBAKE
    return text, REPETITION if any(is_repetitive(UNIT.findall(part)) for part in texts) else KEEP


def is_repetitive(units: list[str]) -> bool:
    """Whether n-grams that come again make up too much of at least MIN_UNITS units."""
    if len(units) < MIN_UNITS:
        return False
    num_chars = sum(map(len, units))
    for n, share in TOP_SHARES.items():
        ngram, count = Counter(zip(*(units[i:] for i in range(n)), strict=False)).most_common(1)[0]
        if count > 1 and count * sum(map(len, ngram)) > share * num_chars:
            return True
    for n, share in REPEATED_SHARES.items():
        seen, repeated, i = set(), 0, 0
        while i <= len(units) - n:
            ngram = tuple(units[i:i + n])
            repeated += sum(map(len, ngram)) if ngram in seen else 0
            i += n if ngram in seen else 1  # no character counts twice
            seen.add(ngram)
        if repeated > share * num_chars:
            return True
        if not repeated:  # then no longer n-gram occurs twice
            return False
    return False


def fingerprints(text: str) -> np.ndarray:
    """[1 + BANDS] uint64: equal where the texts are the same, and in a band where they probably share most 5-grams."""
    units = UNIT.findall(text.casefold())
    ngrams = {" ".join(units[i:i + 5]).encode() for i in range(max(1, len(units) - 4))}
    minhash = new_minhash().copy()
    minhash.update_batch(sorted(ngrams))
    parts = ["".join(text.casefold().split()).encode(), *minhash.hashvalues.astype("<u8").reshape(BANDS, HASHES)]
    return np.frombuffer(b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in parts), np.uint64)


@cache
def new_minhash():
    try:
        from datasketch import MinHash
    except ImportError:
        raise Failure("--clean needs datasketch: pip install datasketch") from None
    return MinHash(num_perm=BANDS * HASHES, seed=1)


def mark_duplicates(keys: np.ndarray, rows: np.ndarray, reasons: np.ndarray, earlier: np.ndarray) -> None:
    """Where row `rows[i]` has one of the `keys[i]` [1 + BANDS] of an earlier row, set its reason and that row."""
    for column in range(keys.shape[1]):
        _, first, inverse = np.unique(keys[:, column], return_index=True, return_inverse=True)
        first = first[inverse]
        new = (first < np.arange(len(rows))) & (reasons[rows] == KEEP)
        reasons[rows[new]] = NEAR if column else EXACT
        earlier[rows[new]] = rows[first[new]]
