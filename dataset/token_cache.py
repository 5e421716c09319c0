"""A data file is tokenised once; later runs map the tokens into memory.

1. What the tokens depend on makes the key: the recipe (version, kind of rows, tokenizer, settings) and the content of
   the file. `cache_dir`/key is the folder of the tokens.
2. Where it is missing, the file is read in one pass, a few megabytes at a time, and tokenised by a thread per core.
3. The folder is made under a temporary name and renamed when it is complete.

It holds `tokens.bin` (uint16), `mask.bin` (uint8, 1 on targets; empty where all are), `ends.npy` (int64, where each
document ends), `meta.json`, and for each row length which sequences make up which row. It can be carried to another
machine without the file (`scripts/prepare_data.py` makes one), and is used there if the recipe is the same.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dataset.packing import Rows, collate
from dataset.reader import RowReport, read_rows, unpacked_size
from model.chat import ChatTokenizer, Segment
from model.cli import UserError, notice
from model.files import open_atomically, write_atomically

CACHE_DIR = Path(__file__).resolve().parent / "cache"
CHUNK_CHARS = 2 << 20  # of text tokenised at a time
PROGRESS_S = 15
ABANDONED_S = 24 * 3600  # without a change
MAX_VOCAB_SIZE = 2**16
VERSION = 3  # increment it when the tokens of a row change

T, R = TypeVar("T"), TypeVar("R")
Parser = Callable[[dict], list[list[Segment]]]  # a row → its documents


class TokenDataset:
    """The packed rows of a data file: `len(data)` rows of `row_length` positions; `batch(row_ids)` gives their tensors.

    `data_path`: a file, or a folder of its tokens. `settings`: arguments of the parser. `key` names the tokens.
    Of each row: `num_tokens`, `num_targets`, and `loss_count`, the number of terms that its loss sums.
    `warnings`: sentences on rows that were skipped or truncated.
    """

    row_kind = ""  # of dataset.formats, as which rows are read
    has_loss_mask = False  # whether some tokens are not targets
    docs_per_row = 1  # documents that a row of the file becomes

    def __init__(self, data_path: str | Path, tokenizer: ChatTokenizer, max_seq_len: int, packing: bool = True,
                 skip_bad_rows: bool = False, cache_dir: str | Path = CACHE_DIR, **settings):
        self.path, self.max_seq_len, self.settings = Path(data_path), max_seq_len, settings
        self.row_length = self.docs_per_row * max_seq_len
        self.folder, self.meta = load_tokens(self.path, type(self).__name__, settings, self.parse, self.row_kind,
                                             tokenizer, self.has_loss_mask, skip_bad_rows, Path(cache_dir))
        report = RowReport(self.path, skip_bad_rows, self.meta["bad"], self.meta["first_bad"],
                           Counter(self.meta["unused"]))
        report.check()
        self.key = self.meta.get("key", self.folder.name)
        self.tokens = np.memmap(self.folder / "tokens.bin", np.uint16, "r")
        self.mask = np.memmap(self.folder / "mask.bin", np.uint8, "r") if self.has_loss_mask else None
        self.row_index_path = self.folder / f"row_index_{max_seq_len}_{'packed' if packing else 'padded'}.npz"
        if not self.row_index_path.exists():
            self._save_row_index(packing)
        with np.load(self.row_index_path) as index:
            self.rows = Rows(index["start"], index["length"], index["row_offsets"])
            self.num_tokens, self.num_targets = index["num_tokens"], index["num_targets"]
            self.warnings = report.warnings() + json.loads(str(index["warnings"]))
        self.max_sequences = int(np.diff(self.rows.row_offsets).max())

    def parse(self, row: dict) -> list[list[Segment]]:
        """A canonical row of `row_kind` → its documents."""
        raise NotImplementedError

    def build_rows(self, start: np.ndarray, length: np.ndarray, packing: bool) -> tuple[Rows, np.ndarray, list[str]]:
        """Documents (start in the token file, positions) → rows, tokens per row, warnings on what was truncated."""
        raise NotImplementedError

    def batch(self, row_ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows → tensors, see `packing.collate`. Row -1 is empty."""
        return collate(self.rows, row_ids, self.tokens, self.mask, self.row_length, self.max_sequences)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def loss_count(self) -> np.ndarray:
        return self.num_targets

    @property
    def utilization(self) -> float:
        """Share of the rows' positions that hold a token."""
        return float(self.num_tokens.sum() / (len(self) * self.row_length))

    def _save_row_index(self, packing: bool) -> None:
        ends = np.load(self.folder / "ends.npy")
        start = np.concatenate(([0], ends[:-1]))
        length = (ends - start - 1).astype(np.int32)
        del ends  # of millions of documents
        rows, num_tokens, warnings = self.build_rows(start, length, packing)
        num_targets = num_tokens
        if self.has_loss_mask:
            mask = np.asarray(self.mask)  # a slice of a memmap is slow to make
            targets = [np.count_nonzero(mask[start + 1:start + length + 1])
                       for start, length in zip(rows.start.tolist(), rows.length.tolist(), strict=True)]
            num_targets = rows.sum_per_row(np.array(targets))
        with open_atomically(self.row_index_path, shared=True) as file:
            np.savez(file, start=rows.start, length=rows.length, row_offsets=rows.row_offsets, num_tokens=num_tokens,
                     num_targets=num_targets, warnings=np.array(json.dumps(warnings)))


def load_tokens(path: Path, kind: str, settings: dict, parse: Parser, row_kind: str, tokenizer: ChatTokenizer,
                has_mask: bool, skip_bad_rows: bool, cache_dir: Path) -> tuple[Path, dict]:
    """The folder of the tokens of `path`, made where it is missing, and its meta.json. `path` may be such a folder.

    Raises UserError for a missing file, a bad row on the way (unless `skip_bad_rows`), a folder of another recipe, and
    a tokenizer of more entries than uint16 counts.
    """
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f"--tokenizer {tokenizer.folder}: {tokenizer.vocab_size:,} entries, but files of tokens hold "
                        f"ids below {MAX_VOCAB_SIZE:,}; train a smaller one with scripts/train_tokenizer.py")
    recipe = [VERSION, kind, tokenizer.hash, settings]
    if path.is_dir():
        folder, meta = path, load_prepared(path, recipe)
    elif path.is_file():
        identity = [VERSION, kind, content_hash(path, cache_dir), tokenizer.hash, settings]
        folder = cache_dir / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        if not (folder / "meta.json").exists():
            tokenise(path, folder, recipe, parse, row_kind, tokenizer, has_mask, skip_bad_rows)
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    else:
        raise UserError(f"--data_path {path}: no such file")
    return folder, meta


def load_prepared(folder: Path, recipe: list) -> dict:
    """The meta.json of a folder of tokens. Raises UserError unless its recipe is `recipe`."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        folder_recipe = meta["made_by"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--data_path {folder}: a folder without tokens (python scripts/prepare_data.py makes one "
                        "with them)") from None
    for name, value, needed in zip(("version", "kind", "tokenizer", "settings"), folder_recipe, recipe, strict=True):
        if value != needed:
            raise UserError(f"--data_path {folder}: its tokens are of {name} {value}, {needed} is needed; make them "
                            "again with scripts/prepare_data.py")
    return meta


def content_hash(path: Path, cache_dir: Path) -> str:
    """Hash of a file's content; remembered by path, size and time of change, so that the file is read once."""
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    record = cache_dir / "files" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(record.read_text())
        if known["stamp"] == stamp:
            return known["hash"]
    except (OSError, ValueError, KeyError):
        pass
    digest = hashlib.blake2b(digest_size=12)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    write_atomically(record, json.dumps({"stamp": stamp, "hash": digest.hexdigest()}), shared=True)
    return digest.hexdigest()


def tokenise(path: Path, folder: Path, recipe: list, parse: Parser, row_kind: str, tokenizer: ChatTokenizer,
             has_mask: bool, skip_bad_rows: bool) -> None:
    """Write the folder of the tokens of `path`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
        if time.time() - newest_change(abandoned) > ABANDONED_S:
            shutil.rmtree(abandoned, ignore_errors=True)
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    ends, num_tokens = array("q"), 0  # millions of documents: a list would take 40 bytes for each
    report, progress = RowReport(path, skip_bad_rows), Progress(f"tokenising {path.name}", unpacked_size(path))
    try:
        with open(temporary / "tokens.bin", "wb") as tokens, open(temporary / "mask.bin", "wb") as masks:
            for ids, mask, lengths in map_ahead(partial(encode, tokenizer),
                                                read_documents(path, parse, row_kind, report)):
                ids.tofile(tokens)
                if has_mask:
                    mask.tofile(masks)
                ends.frombytes((num_tokens + np.cumsum(lengths)).tobytes())
                num_tokens += len(ids)
                progress.update(report.num_bytes)
            for file in (tokens, masks):
                file.flush()
                os.fsync(file.fileno())
        if not ends:
            raise UserError(f"{path}: no usable row in it{report.first_reason}")
        with open_atomically(temporary / "ends.npy") as file:
            np.save(file, np.frombuffer(ends, np.int64))
        meta = {"source": str(path), "documents": len(ends), "tokens": num_tokens, "bad": report.bad,
                "first_bad": report.first_bad, "unused": report.unused, "key": folder.name, "made_by": recipe}
        write_atomically(temporary / "meta.json", json.dumps(meta, ensure_ascii=False))
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "meta.json").exists():  # else another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def newest_change(folder: Path) -> float:
    """When something in `folder` changed last, in seconds since 1970."""
    with suppress(FileNotFoundError):  # which another process removes just now
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return time.time()


class Progress:
    """Lines on stderr about a long task, every `PROGRESS_S` seconds: megabytes, megabytes/s, time left."""

    def __init__(self, task: str, total: int | None):
        self.task, self.total, self.start = task, total, time.monotonic()
        self.next_line = self.start + PROGRESS_S

    def update(self, num_bytes: int) -> None:
        if (now := time.monotonic()) < self.next_line:
            return
        self.next_line = now + PROGRESS_S
        speed = num_bytes / (now - self.start)
        of_total = f" of {self.total / 1e6:,.0f} MB, {(self.total - num_bytes) / speed / 60:.0f} min left" \
            if self.total else " MB"
        notice(f"{self.task}: {num_bytes / 1e6:,.0f}{of_total}, {speed / 1e6:.1f} MB/s")


def encode(tokenizer: ChatTokenizer, documents: list[list[Segment]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents → token ids (uint16) and loss mask (uint8) of all, and the number of tokens of each (int64)."""
    segments, is_target = zip(*chain.from_iterable(documents), strict=True) if documents else ((), ())
    texts = list({segment for segment in segments if isinstance(segment, str)})  # "user\n" and others are many
    ids_of = dict(zip(texts, tokenizer.encode_texts(texts), strict=True))
    pieces = [ids_of[segment] if isinstance(segment, str) else (segment,) for segment in segments]
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ids = np.fromiter(chain.from_iterable(pieces), np.uint16, lengths.sum())
    bounds = np.cumsum([0, *map(len, documents)])
    ends = np.concatenate(([0], np.cumsum(lengths)))[bounds]
    return ids, np.repeat(np.array(is_target, np.uint8), lengths), np.diff(ends)


def map_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, with the next items computed by a thread per core meanwhile. At most two per thread are held."""
    num_threads = int(os.environ.get("RAYON_NUM_THREADS", 0)) or os.cpu_count() or 1  # --num_workers sets it
    with ThreadPoolExecutor(num_threads) as pool:
        running: deque = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * num_threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def read_documents(path: Path, parse: Parser, row_kind: str, report: RowReport) -> Iterator[list[list[Segment]]]:
    """The documents of the file's rows, about `CHUNK_CHARS` at a time."""
    documents, num_chars = [], 0
    for _, parsed in read_rows(path, parse, report, row_kind):
        documents += parsed
        num_chars += sum(len(segment) for document in parsed for segment, _ in document if isinstance(segment, str))
        if num_chars > CHUNK_CHARS:
            yield documents
            documents, num_chars = [], 0
    yield documents
