"""jsonl rows → token sequences, one class per row format; tokenised once, memory-mapped ever after.

The token file lies in `cache_dir`, in a folder named after the data's content, the tokenizer and the settings:
`tokens.bin` (uint16), `mask.bin` (uint8, 1 where the assistant speaks), `ends.npy` and `meta.json`. It is made in one
pass over the file, a few megabytes at a time, on all cores. Such a folder can be carried to another machine without the
file (`scripts/prepare_data.py` makes one): it is a data path like any other.
"""

import gzip
import hashlib
import json
import os
import random
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dataset.packing import Rows, collate, cut_at_answers, pack, pack_shared_prefix, split_long
from model.chat import BOS, EOS, ChatTokenizer, Segment, read_json, render
from model.cli import UserError
from model.files import open_atomically, write_atomically

CACHE_DIR = Path(__file__).resolve().parent / "cache"
CHUNK_BYTES = 4 << 20  # of text tokenised at a time
VERSION = 2  # of the token file: raise it when the same row becomes other tokens

SYSTEM_PROMPTS = {
    "zh": ("你是一个乐于助人的小语言模型。", "你是 MiniMind，请用简洁的话回答问题。",
           "请尽力回答用户的问题，不知道就说不知道。", "你是一位耐心的助手，说话清楚、准确。",
           "你是一个会中文和英文的聊天助手。"),
    "en": ("You are a small and helpful language model.", "You are MiniMind. Answer in a few clear words.",
           "Answer the user as well as you can, and say so when you do not know.",
           "You are a patient assistant who is clear and exact.",
           "You are an assistant who chats in Chinese and English."),
}


def read_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a jsonl or jsonl.gz file. Raises UserError when it cannot be read."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except FileNotFoundError:
        raise UserError(f"--data_path {path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read: {error}") from None


def parse_row(line: bytes) -> dict:
    """One line → the row. Raises ValueError saying what is wrong."""
    if not line.strip():
        raise ValueError("empty line")
    try:
        row = read_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, not {type(row).__name__}")
    return row


def content_hash(path: Path, cache_dir: Path) -> str:
    """Hash of a file's content; remembered by path, size and time of change, so that it is read once."""
    stat = path.stat()
    known_at = cache_dir / "files" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
    stamp = [stat.st_size, stat.st_mtime_ns]
    try:
        known = json.loads(known_at.read_text())
        if known["stamp"] == stamp:
            return known["hash"]
    except (OSError, ValueError, KeyError):
        pass
    digest = hashlib.blake2b(digest_size=12)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    write_atomically(known_at, json.dumps({"stamp": stamp, "hash": digest.hexdigest()}), shared=True)
    return digest.hexdigest()


class TokenDataset:
    """Packed rows of one data file. A subclass says how a row reads (`segments`) and how a document is cut (`cut`).

    `data_path`: the file, or the folder of its tokens; `key` names the tokens, wherever they lie.
    len(dataset) rows of `row_length` positions; `batch(indices)` → the tensors of these rows; `loss_count[r]`: how many
    terms the loss of row r sums; `num_targets[r]`, `num_tokens[r]`: tokens with a label, and tokens, in it; `warnings`:
    what was skipped or cut, as sentences for the user.
    """

    has_loss_mask = False  # whether some tokens of a document are not to be learned
    sides = 1  # documents a row of the file has
    plan = "rows"  # name of the file that says which pieces make up which row

    def __init__(self, data_path: str | Path, tokenizer: ChatTokenizer, max_seq_len: int, packing: bool = True,
                 skip_bad_rows: bool = False, cache_dir: str | Path = CACHE_DIR, **settings):
        self.path, self.tokenizer, self.max_seq_len = Path(data_path), tokenizer, max_seq_len
        self.row_length = self.sides * max_seq_len
        self.settings, self.skip_bad_rows = settings, skip_bad_rows
        made_by = [VERSION, type(self).__name__, tokenizer.hash, settings]
        if self.path.is_dir():
            self.folder = self.path
            self.meta = self._ready_made(made_by)
        elif self.path.is_file():
            cache_dir = Path(cache_dir)
            identity = [*made_by[:2], content_hash(self.path, cache_dir), *made_by[2:]]
            key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
            self.folder = cache_dir / key
            if not (self.folder / "meta.json").exists():
                self._tokenise(self.folder, made_by)
            self.meta = json.loads((self.folder / "meta.json").read_text("utf-8"))
        else:
            raise UserError(f"--data_path {data_path}: no such file")
        self.key = self.meta.get("key", self.folder.name)
        if self.meta["bad"] and not skip_bad_rows:
            raise self._bad_row(self.meta["first_bad"][0])
        self.tokens = np.memmap(self.folder / "tokens.bin", np.uint16, "r")
        self.mask = np.memmap(self.folder / "mask.bin", np.uint8, "r") if self.has_loss_mask else None
        self._load_plan(self.folder / f"{self.plan}_{max_seq_len}_{'packed' if packing else 'padded'}.npz", packing)

    def documents(self, row: dict) -> list[list[Segment]]:
        """One row of the file → its documents, to be tokenised. Raises ValueError saying what is wrong with it."""
        return [self.segments(row)]

    def segments(self, row: dict) -> list[Segment]:
        """The document of a row that has one."""
        raise NotImplementedError

    def cut(self, start: np.ndarray, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Documents → pieces of at most max_seq_len questions: starts, lengths, and sentences on what was lost."""
        raise NotImplementedError

    def arrange(self, start: np.ndarray, questions: np.ndarray, packing: bool) -> tuple[Rows, list[str]]:
        """Documents → rows, and sentences on what was lost."""
        start, length, lost = self.cut(start, questions)
        return pack(start, length, self.row_length, packing), lost

    def positions(self, rows: Rows) -> np.ndarray:
        """How many positions of its row each piece takes."""
        return rows.length

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def loss_count(self) -> np.ndarray:
        return self.num_targets

    def batch(self, wanted: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows → tensors, see `packing.collate`."""
        return collate(self.rows, wanted, self.tokens, self.mask, self.row_length, self.max_sequences)

    @property
    def utilization(self) -> float:
        """Share of the rows' positions that hold a token."""
        return float(self.num_tokens.sum() / (len(self) * self.row_length))

    def _ready_made(self, made_by: list) -> dict:
        """The meta.json of a folder of tokens, if they are those that the file would become here."""
        try:
            meta = json.loads((self.path / "meta.json").read_text("utf-8"))
            found = meta["made_by"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"--data_path {self.path}: a folder, but not of tokens (python scripts/prepare_data.py "
                            "makes one of a file)") from None
        for name, there, wanted in zip(("version", "kind", "tokenizer", "settings"), found, made_by, strict=True):
            if there != wanted:
                raise UserError(f"--data_path {self.path}: its tokens are of {name} {there}, needed is {wanted}; "
                                "make them anew with scripts/prepare_data.py")
        return meta

    def _tokenise(self, folder: Path, made_by: list) -> None:
        """Write the token file, whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        ends, total, bad, first_bad = array("q"), 0, 0, []  # millions of documents: a list would take 40 bytes each
        try:
            with open(work / "tokens.bin", "wb") as tokens, open(work / "mask.bin", "wb") as masks:
                for conversations, errors in self._chunks():
                    bad, first_bad = bad + len(errors), (first_bad + errors)[:5]
                    if bad and not self.skip_bad_rows:
                        raise self._bad_row(first_bad[0])
                    for ids, mask in self.tokenizer.encode_segments(conversations):
                        tokens.write(np.array(ids, np.uint16).tobytes())
                        if self.has_loss_mask:
                            masks.write(np.array(mask, np.uint8).tobytes())
                        total += len(ids)
                        ends.append(total)
                for file in (tokens, masks):
                    file.flush()
                    os.fsync(file.fileno())
            if not ends:
                raise UserError(f"{self.path}: no usable row in it")
            np.save(work / "ends.npy", np.frombuffer(ends, np.int64))
            meta = {"source": str(self.path), "documents": len(ends), "tokens": total, "bad": bad,
                    "first_bad": first_bad, "key": folder.name, "made_by": made_by}
            write_atomically(work / "meta.json", json.dumps(meta, ensure_ascii=False))
            os.rename(work, folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _bad_row(self, complaint: str) -> UserError:
        return UserError(f"{self.path}:{complaint} (--skip_bad_rows 1 leaves such rows out)")

    def _chunks(self) -> Iterator[tuple[list[list[Segment]], list[str]]]:
        """The file's rows as pieces, a few megabytes at a time, and complaints about bad ones: "line: words"."""
        conversations, errors, size = [], [], 0
        for number, line in read_rows(self.path):
            try:
                conversations += self.documents(parse_row(line))
            except ValueError as error:
                errors.append(f"{number}: {error}")
            size += len(line)
            if size > CHUNK_BYTES:
                yield conversations, errors
                conversations, errors, size = [], [], 0
        yield conversations, errors

    def _load_plan(self, path: Path, packing: bool) -> None:
        """Which pieces make up which row: from the cache, or made and put there."""
        self.row_index_path = path
        if not path.exists():
            ends = np.load(self.folder / "ends.npy")
            start = np.concatenate(([0], ends[:-1]))
            rows, lost = self.arrange(start, ends - start - 1, packing)
            row_of_piece = np.repeat(np.arange(len(rows)), np.diff(rows.row_offsets))
            real = np.bincount(row_of_piece, self.positions(rows), len(rows)).astype(np.int64)
            if self.has_loss_mask:
                said = np.asarray(self.mask)  # a slice of a memmap is slow to make
                labels = [np.count_nonzero(said[start + 1:start + length + 1])
                          for start, length in zip(rows.start.tolist(), rows.length.tolist(), strict=True)]
                supervised = np.bincount(row_of_piece, labels, len(rows)).astype(np.int64)
            else:
                supervised = real
            with open_atomically(path, shared=True) as file:
                np.savez(file, start=rows.start, length=rows.length, first=rows.row_offsets, real=real,
                         supervised=supervised, lost=np.array(json.dumps(lost)))
        with np.load(path) as plan:
            self.rows = Rows(plan["start"], plan["length"], plan["first"])
            self.num_tokens, self.num_targets = plan["real"], plan["supervised"]
            self.warnings = json.loads(str(plan["lost"]))
        self.max_sequences = int(np.diff(self.rows.row_offsets).max())
        if self.meta["bad"]:
            first = "; ".join(f"line {complaint}" for complaint in self.meta["first_bad"])
            self.warnings.insert(0, f"skipped {self.meta['bad']:,} bad rows of {self.path}, the first: {first}")


class PretrainDataset(TokenDataset):
    """{"text": …}: `<|im_start|>` text `<|im_end|>`, every token learned; a long text continues in further pieces."""

    def segments(self, row: dict) -> list[Segment]:
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError('a pretraining row is {"text": …}' + ("" if text is None else ", text"))
        if not text.strip():
            raise ValueError("the text is empty")
        return [(BOS, True), (text, True), (EOS, True)]

    def cut(self, start, questions):
        return *split_long(start, questions, self.max_seq_len), []


class SFTDataset(TokenDataset):
    """{"conversations": [messages]}: only what the assistant says is learned.

    `system_prompt_ratio` of the conversations that have none get a system prompt; of those without reasoning,
    `empty_think_ratio` keep their empty think blocks. Which ones: decided by the seed and the row itself.
    """

    has_loss_mask = True

    def __init__(self, data_path, tokenizer, max_seq_len, packing=True, skip_bad_rows=False, cache_dir=CACHE_DIR, *,
                 seed: int = 42, system_prompt_ratio: float = 0.2, empty_think_ratio: float = 0.2):
        super().__init__(data_path, tokenizer, max_seq_len, packing, skip_bad_rows, cache_dir, seed=seed,
                         system_prompt_ratio=system_prompt_ratio, empty_think_ratio=empty_think_ratio)

    def segments(self, row: dict) -> list[Segment]:
        messages = parse_conversation(row)
        if not any(message.get("role") == "assistant" for message in messages):
            raise ValueError("no message of the assistant's, so nothing to learn")
        text = str(messages)
        chance = random.Random(f"{self.settings['seed']} {text}")
        add_system, keep_think = (chance.random() < self.settings[ratio]
                                  for ratio in ("system_prompt_ratio", "empty_think_ratio"))
        rendered = render(messages, keep_empty_think=keep_think)
        if add_system and messages[0].get("role") != "system":
            language = "zh" if any("一" <= character <= "鿿" for character in text) else "en"
            rendered = render([{"role": "system", "content": chance.choice(SYSTEM_PROMPTS[language])}]) + rendered
        return rendered

    def cut(self, start, questions):
        kept, answers_cut = cut_at_answers(start, questions, self.mask, self.max_seq_len)
        shortened, lost = int((kept < questions).sum()), float((questions - kept).sum() / questions.sum())
        report = [f"{shortened:,} of {len(start):,} conversations exceed {self.max_seq_len} tokens and end at the last "
                  f"answer that fits ({lost:.1%} of all tokens left out); {answers_cut:,} first answers are cut"]
        return start, kept, report if shortened else []


class DPODataset(TokenDataset):
    """{"chosen": [messages], "rejected": [messages]}, the same prompt and two answers: only the answers are learned.

    `max_seq_len` bounds each of the two. A row has twice as many positions and holds whole pairs, each as its prompt,
    once, and the two answers. `loss_count`: pairs. `ref_logprobs`: Σ log p_ref of each document, [documents] in the
    order of the rows, or None.
    """

    has_loss_mask, sides, plan, ref_logprobs = True, 2, "pairs", None

    def documents(self, row: dict) -> list[list[Segment]]:
        pair = {side: parse_messages(row, side, '{"chosen": [messages], "rejected": [messages]}')
                for side in ("chosen", "rejected")}
        if pair["chosen"][:-1] != pair["rejected"][:-1]:
            raise ValueError("the prompts of chosen and rejected differ; only their last messages may")
        thinks = any(messages[-1].get("reasoning_content") for messages in pair.values())
        return [answer_segments(messages, side, thinks) for side, messages in pair.items()]

    def prompt(self, start: int, length: int) -> int:
        """How many tokens come before the answer of a document; `length` + 1 if none is left of that."""
        said = np.flatnonzero(self.mask[start:start + length + 1])
        return int(said[0]) if len(said) else length + 1

    def arrange(self, start, questions, packing):
        kept = np.minimum(questions, self.max_seq_len)
        prompt = np.array([self.prompt(*each) for each in zip(start[::2].tolist(), kept[::2].tolist(), strict=True)])
        pairs = np.flatnonzero(prompt <= kept.reshape(-1, 2).min(1))
        if not len(pairs):
            raise UserError(f"{self.path}: every prompt fills --max_seq_len {self.max_seq_len}, no answer is left")
        rows = pack(pairs, (kept.reshape(-1, 2).sum(1) - prompt)[pairs], self.row_length, packing)
        documents = (2 * rows.start[:, None] + [0, 1]).ravel()
        cut, total = int((kept < questions).reshape(-1, 2).any(1)[pairs].sum()), len(start) // 2
        report = [f"{cut:,} of {total:,} pairs have a side of more than {self.max_seq_len} tokens, which is cut; "
                  f"{total - len(pairs):,} more, whose prompt is that long, are left out"]
        rows = Rows(start[documents], kept[documents].astype(np.int32), 2 * rows.row_offsets)
        return rows, report if cut or len(pairs) < total else []

    def positions(self, rows):
        prompts = [self.prompt(*each) for each in zip(rows.start[::2].tolist(), rows.length[::2].tolist(), strict=True)]
        own = rows.length.copy()
        own[1::2] -= np.array(prompts, np.int32)
        return own

    @property
    def loss_count(self) -> np.ndarray:
        return np.diff(self.rows.row_offsets) // 2

    def batch(self, wanted):
        """What `pack_shared_prefix` gives, of the D documents; 2i and 2i + 1 are the two sides of pair i.

        `ends` [D]: the flat index of the last position of each; `document` [M]: which of them each of `logits_indices`
        belongs to, `token_at` [M]: where the token itself stands; `ref_logprobs` [D], if set.
        """
        bounds = self.rows.row_offsets
        documents = np.concatenate([np.arange(bounds[row], bounds[row + 1]) for row in wanted if row >= 0]
                                   or [np.arange(0)])
        trees, said = [], [np.zeros(0, np.uint8)]
        for pair in documents.reshape(-1, 2):
            start, length = self.rows.start[pair].tolist(), self.rows.length[pair].tolist()
            n = self.prompt(start[0], length[0])
            answers = [slice(begin + n, begin + asks + 1) for begin, asks in zip(start, length, strict=True)]
            trees.append((self.tokens[start[0]:start[0] + n], [self.tokens[answer] for answer in answers]))
            said += [self.mask[answer] for answer in answers]
        batch = pack_shared_prefix(trees, len(wanted) * self.row_length)
        lengths = np.array([len(mask) for mask in said[1:]], np.int64)
        last, asked = torch.from_numpy(np.cumsum(lengths) - 1), batch["logits_indices"]
        token_at = torch.cat((asked[1:], asked[-1:]))
        token_at[last] = asked[last]  # nothing is read after the last token
        learned = torch.from_numpy(np.concatenate(said) != 0)
        batch |= {"token_at": token_at, "document": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))}
        batch |= {name: batch[name][learned] for name in ("logits_indices", "targets", "document", "token_at")}
        batch["ends"] = asked[last]
        if self.ref_logprobs is not None:
            batch["ref_logprobs"] = self.ref_logprobs[torch.from_numpy(documents)]
        return batch


def answer_segments(messages: list[dict], side: str, thinks: bool) -> list[Segment]:
    """A conversation of which only the last message is learned. Raises ValueError when that is no answer.

    Where one side of a pair `thinks`, the other side's empty think block is a choice of its answer too.
    """
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(f"{side} is not a prompt and an answer of the assistant's")
    prompt, whole = render(messages[:-1]), render(messages)
    start, answer, end = whole[:len(prompt) + 2], whole[len(prompt) + 2:-1], whole[-1:]
    if not any(said and isinstance(piece, str) and piece.strip() for piece, said in answer):
        raise ValueError(f"the answer of {side} is empty")
    return [(piece, False) for piece, _ in start] + [(piece, said or thinks) for piece, said in answer] + end


def parse_conversation(row: dict) -> list[dict]:
    """The messages of a row. Raises ValueError when there are none."""
    return parse_messages(row, "conversations", '{"conversations": [messages]}')


def parse_messages(row: dict, name: str, form: str) -> list[dict]:
    """The messages in field `name` of a row, which has `form`. Raises ValueError when there are none."""
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a row is {form}" + ("" if messages is None else ", one or more"))
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("a message is an object with role and content")
    return messages
