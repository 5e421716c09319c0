"""Does a choice learn better? Train the same small model on the same text with each choice, several seeds, and compare.

With --seconds every choice gets the same training time: a few steps show how fast it is, then it makes one pass over as
many rows as fit, from the front of the same text, and its learning-rate schedule ends with them. With --tokens every
choice gets the same number of tokens, as many rows as have them. Otherwise every choice of a seed gets the same rows in
the same order. Start-up, compilation, tokenisation and validation are not counted.

    python benchmarks/quality.py --choices levers --seconds 60 --hidden_size 128 \\
        --data_path ../shared/data/pretrain.jsonl.gz --val_data_path ../shared/data/pretrain_val.jsonl.gz
    python benchmarks/quality.py --choices schedule --tokens 2e6 --data_path … --val_data_path …
    python benchmarks/quality.py --choices recipes --seconds 400 --validations 6 --data_path … --val_data_path …
"""

import argparse
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.machine import model_parser, save_result, train
from dataset.reader import read_lines, read_rows
from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import CHINESE, UserError, nonneg_float, nonneg_int, positive_int, run_main
from model.weights import ROOT

# the recipe as published: padded rows, AdamW, 256 rows per step, eager
PLAIN = {"packing": 0, "optimizer": "adamw", "batch_size": 32, "accumulation_steps": 8, "learning_rate": 5e-4,
         "warmup_ratio": 0.02, "weight_decay": 0.1, "use_compile": 0}
PACKED, COMPILED, MUON = {"packing": 1}, {"use_compile": 1}, {"optimizer": "muon", "learning_rate": 2e-3}
SMALL_STEPS = {"batch_size": 8, "accumulation_steps": 1, "learning_rate": 2e-3, "warmup_ratio": 0.05}
FAST = {**PLAIN, **PACKED, **COMPILED, **SMALL_STEPS}
ALL = {**FAST, **MUON}
UNMASKED = {"change": "no document masking"}  # of the code, where there is no flag: see CHANGES
CHOICES = {  # name → the flags of train_pretrain.py that make each choice
    "levers": {"plain": PLAIN,
               "+ packing": {**PLAIN, **PACKED, **UNMASKED},
               "+ packing, document masking": {**PLAIN, **PACKED},
               "+ compile": {**PLAIN, **COMPILED},
               "+ Muon": {**PLAIN, **MUON},
               "+ 8 rows a step, 2e-3": {**PLAIN, **SMALL_STEPS},
               "+ MoE": {**PLAIN, "use_moe": 1},
               "default": {**PLAIN, **PACKED, **COMPILED},
               "default, 8 rows a step, 2e-3": FAST,
               "… and Muon": ALL,
               "… and Muon, padded": {**ALL, "packing": 0},
               "… and Muon, eager": {**ALL, "use_compile": 0},
               "… and Muon, no document masking": {**ALL, **UNMASKED},
               "… and Muon and MoE": {**ALL, "use_moe": 1}},
    "recipes": {"published": {**PLAIN, **SMALL_STEPS, "weight_decay": 0.01, "dtype": "float32",
                              "change": "default betas"},
                "ours": ALL},
    "schedule": {"cosine to a tenth": ALL, "cosine to 0": {**ALL, "change": "cosine to 0"},
                 "WSD: linear to 0 over the last fifth": {**ALL, "lr_schedule": "wsd"}},
    "epochs": {"1 pass": ALL, "2 passes over half": {**ALL, "epochs": 2},
               "4 passes over a quarter": {**ALL, "epochs": 4}},
    "batch": {"4 rows": {**ALL, "batch_size": 4}, "8 rows": ALL, "16 rows": {**ALL, "batch_size": 16},
              "4, then 8, then 16 rows": {**ALL, "change": "batch ramp"}},
    # nearly the same number of parameters in the blocks
    "shape": {f"{width} x {depth}": {**ALL, "hidden_size": width, "num_hidden_layers": depth}
              for width, depth in ((384, 2), (256, 4), (192, 8), (128, 16))},
    # how much more of the English and of the Chinese rows the tokenizer is made of; digits of a number per token
    "vocabulary": {"every 12th row of both languages": {**ALL, "vocabulary": (1, 1, 1)},
                   "four times the Chinese": {**ALL, "vocabulary": (1, 4, 1)},
                   "four times the English": {**ALL, "vocabulary": (4, 1, 1)},
                   "up to three digits per token": {**ALL, "vocabulary": (1, 1, 3)}},
    "router": {"raw": {"use_moe": 1, "norm_topk_prob": 0, "optimizer": "muon"},
               "normalised": {"use_moe": 1, "norm_topk_prob": 1, "optimizer": "muon"}},
    "optimizer": {f"{optimizer} {rate}": {"optimizer": optimizer, "learning_rate": rate}
                  for optimizer in ("adamw", "muon") for rate in ("1e-3", "3e-3")},
    "packing": {"packed": {"packing": 1}, "padded": {"packing": 0}},
}
NUM_VAL_ROWS = 200
NUM_CALIBRATION_ROWS = 192  # that show how fast a choice is


def unmask() -> mock._patch:
    """A token of a training row attends to all before it, of any document."""
    import torch

    from trainer.batches import BatchStream

    def merged(batch: dict) -> dict:
        B, T = batch["input_ids"].shape
        bounds = (torch.arange(len(batch["cu_seqlens"]), dtype=torch.int32) * T).clamp(max=B * T)
        return batch | {"cu_seqlens": bounds, "position_ids": torch.arange(T).expand(B, T).contiguous()}

    def init(stream, data, *arguments):
        original_init(stream, data, *arguments)
        batch = data.batch
        data.batch = lambda rows: merged(batch(rows))  # of the training rows only

    original_init = BatchStream.__init__
    return mock.patch.object(BatchStream, "__init__", init)


def fall_to_zero() -> mock._patch:
    """After the warm-up, half a cosine to 0."""
    def rate(step: int, steps: int, peak: float, warmup: int, _: str) -> float:
        left = (steps - step) / max(1, steps - warmup)
        return peak * ((step + 1) / warmup if step < warmup else (1 - math.cos(math.pi * left)) / 2)

    return mock.patch("trainer.trainer.learning_rate", rate)


def ramp_batch() -> mock._patch:
    """Half the rows per step for the first quarter of the data, as given for the second, then twice as many.

    The number of steps stays.
    """
    from trainer.batches import BatchStream, sampler_indices

    def rows(stream, step: int):
        num_rows, quarter = stream.rows_per_step, stream.steps // 4
        sizes = [num_rows // 2] * (2 * quarter) + [num_rows] * quarter
        sizes += [2 * num_rows] * (stream.steps - len(sizes))
        return sampler_indices(sum(sizes[:step]), sizes[step], stream.seed, len(stream.dataset))

    return mock.patch.object(BatchStream, "rows", rows)


def default_betas() -> mock._patch:
    """AdamW with torch's own momenta, 0.9 and 0.999."""
    from torch.optim import AdamW

    return mock.patch("torch.optim.AdamW", lambda *args, **options: AdamW(*args, **{**options, "betas": (0.9, 0.999)}))


CHANGES = {"no document masking": unmask, "cosine to 0": fall_to_zero, "batch ramp": ramp_batch,
           "default betas": default_betas}


def train_changed(change: str, flags: list[str]) -> None:
    """Run train_pretrain.py in this process, with one of CHANGES of its code."""
    from trainer import train_pretrain

    with CHANGES[change](), mock.patch.object(sys, "argv", ["train_pretrain.py", *flags]):
        train_pretrain.main()


def make_tokenizer(source: Path, english: int, chinese: int, digits: int, folder: Path) -> Path:
    """Train a tokenizer on every 12th row of one language and on `english` or `chinese` times as many of the other.

    digits: of a number, how many share a token.
    """
    from scripts import train_tokenizer

    def texts() -> Iterator[str]:
        counts = {True: 0, False: 0}
        for _, row in read_rows(source):
            is_chinese = bool(CHINESE.search(row["text"]))
            counts[is_chinese] += 1
            if counts[is_chinese] % (12 // (chinese if is_chinese else english)) == 0:
                yield row["text"]

    target = folder / f"tokenizer_{english}_{chinese}_{digits}"
    if not target.exists():
        split = train_tokenizer.SPLIT.replace(r"|\p{N}|", rf"|\p{{N}}{{1,{digits}}}|")
        with mock.patch.object(train_tokenizer, "SPLIT", split):
            tokenizer = train_tokenizer.train(texts(), 6400)
        target.mkdir()
        train_tokenizer.save(tokenizer, target)
    return target


def train_choice(choice: dict, args: argparse.Namespace, data: Path, val: Path | None,
                 **overrides) -> tuple[list[dict], str]:
    """One run of train_pretrain.py. → the rows of its log, and its output"""
    with tempfile.TemporaryDirectory() as folder:
        flags = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers", "use_moe", "batch_size",
                                                        "device")}
        flags |= {"data_path": data, "cache_dir": folder, "use_compile": 1, "accumulation_steps": 1,
                  "learning_rate": 2e-3, "warmup_ratio": 0.05, "weight_decay": 0.1, "adapt_threads": 0,
                  **({"val_data_path": val} if val else {})}
        flags |= choice | overrides
        change = flags.pop("change", None)
        script = [__file__, "--changed", change] if change else [ROOT / "trainer/train_pretrain.py"]
        return train(script, flags, Path(folder))


def outcome(log: list[dict]) -> dict:
    """The last validation, the seconds of training, and [tokens, seconds, bits per byte] of all validations.

    The first interval, which compiles, counts as the others.
    """
    last, first = log[-1], log[0]
    tokens = [row["tokens"] for row in log]
    seconds = [(after - before) / row["tokens_per_s"] for before, after, row in zip([0, *tokens], tokens, log,
                                                                                     strict=False)]
    if len(log) > 1:
        seconds[0] = sum(seconds[1:]) * first["step"] / (last["step"] - first["step"])
    seconds = list(accumulate(seconds))
    curve = [[row["tokens"], duration, row["val_bpb"]] for row, duration in zip(log, seconds, strict=True)
             if "val_bpb" in row]
    return {"val_bpb": last["val_bpb"], "val_loss": last["val_loss"], "train_loss": last["loss"], "steps": last["step"],
            "tokens": last["tokens"], "seconds": seconds[-1], "curve": curve}


def train_for_seconds(choice: dict, args: argparse.Namespace, folder: Path, val: Path, seed: int) -> dict:
    """Train for --seconds on the front of the text, as much of it as fits."""
    half = max(1, NUM_CALIBRATION_ROWS // choice["batch_size"] // 2)
    sample = front(args.data_path, folder / "sample.jsonl", num_rows=2000)
    log, output = train_choice(choice, args, sample, None, max_steps=2 * half, log_interval=half, epochs=1000,
                               seed=seed, accumulation_steps=1)
    num_tokens, num_rows = (int(number.replace(",", "")) for number in re.search(
        r"([\d,]+) tokens in ([\d,]+) rows", output).groups())
    tokens_per_step = choice["batch_size"] * choice["accumulation_steps"] * num_tokens / num_rows
    num_steps = max(1, round(args.seconds * log[-1]["tokens_per_s"] / tokens_per_step))
    # a little less than the text of so many steps, else a last step has only a few rows
    num_bytes = num_steps * tokens_per_step * sample.stat().st_size / num_tokens * 0.99
    text = front(args.data_path, folder / "text.jsonl", num_bytes=num_bytes)
    return outcome(train_choice(choice, args, text, val, epochs=1, seed=seed, **intervals(args, num_steps))[0])


def train_for_tokens(choice: dict, args: argparse.Namespace, folder: Path, val: Path, seed: int) -> dict:
    """Train on --tokens from the front of the text, in as many passes as the choice makes."""
    choice = {"epochs": 1} | choice
    if args.choices != "recipes":  # whose seconds are compared, too
        choice["use_compile"] = 0
    if vocabulary := choice.pop("vocabulary", None):
        choice["tokenizer"] = make_tokenizer(args.data_path, *vocabulary, folder)
    sample = front(args.data_path, folder / "sample.jsonl", num_rows=2000)
    ids = ChatTokenizer(choice.get("tokenizer", TOKENIZER_DIR)).encode_texts(
        [row["text"] for _, row in read_rows(sample)])
    bytes_per_token = sample.stat().st_size / sum(map(len, ids))
    text = front(args.data_path, folder / "text.jsonl", num_bytes=args.tokens / choice["epochs"] * bytes_per_token)
    num_steps = max(1, round(args.tokens / 340 / choice["batch_size"]))
    return outcome(train_choice(choice, args, text, val, seed=seed, **intervals(args, num_steps))[0])


def intervals(args: argparse.Namespace, num_steps: int) -> dict[str, int]:
    """The flags of about ten log lines, and of --validations along the way."""
    return {"log_interval": max(1, num_steps // 10), "eval_interval": num_steps // max(1, args.validations)}


def front(source: Path, target: Path, num_rows: int | None = None, num_bytes: float = math.inf) -> Path:
    """Write the first rows of a file: `num_rows`, or as many as have `num_bytes`."""
    with open(target, "wb") as file:
        for _, line in islice(read_lines(source), num_rows):
            if file.tell() >= num_bytes:
                return target
            file.write(line)
    if num_bytes < math.inf:
        raise UserError(f"--data_path {source}: too short; it would have to be read twice")
    return target


def main() -> None:
    parser = model_parser(__doc__)
    parser.set_defaults(hidden_size=256, num_hidden_layers=4)
    parser.add_argument("--choices", choices=CHOICES, required=True)
    parser.add_argument("--only", nargs="+", default=[], help="of these choices, only those with such a name")
    parser.add_argument("--data_path", type=Path, required=True, help="text to train on")
    parser.add_argument("--val_data_path", type=Path, required=True, help=f"to compare on: {NUM_VAL_ROWS} rows")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seconds", type=nonneg_float, default=0,
                        help="seconds of training per choice (0: the same rows)")
    amount.add_argument("--tokens", type=nonneg_float, default=0,
                        help="tokens to train on per choice (0: the same rows)")
    parser.add_argument("--validations", type=positive_int, default=1,
                        help="validations per run with --seconds or --tokens")
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows per step")
    parser.add_argument("--epochs", type=positive_int, default=1)
    parser.add_argument("--max_steps", type=nonneg_int, default=0, help="stop after this many steps (0: all epochs)")
    args = parser.parse_args()
    if args.choices == "levers" and not args.seconds:
        parser.error("--choices levers are compared in the same time: give --seconds")
    if args.choices in ("epochs", "vocabulary") and not args.tokens:
        parser.error(f"--choices {args.choices} are compared on as many tokens: give --tokens")
    if args.choices in ("router", "optimizer", "packing") and args.seconds + args.tokens:
        parser.error(f"--choices {args.choices} are compared on the same rows: leave --seconds and --tokens out")
    if args.choices == "recipes" and not args.seconds + args.tokens:
        parser.error("--choices recipes: give --seconds or --tokens")
    choices = {name: flags for name, flags in CHOICES[args.choices].items() if not args.only or name in args.only}
    results: dict[str, list[dict]] = {name: [] for name in choices}
    with tempfile.TemporaryDirectory() as folder:
        val = front(args.val_data_path, Path(folder, "val.jsonl"), num_rows=NUM_VAL_ROWS)
        for seed in range(args.seeds):
            for name, choice in choices.items():
                if args.seconds or args.tokens:
                    work = train_for_seconds if args.seconds else train_for_tokens
                    result = work(choice, args, Path(folder), val, seed)
                else:
                    result = outcome(train_choice(choice, args, args.data_path, val, epochs=args.epochs,
                                                  log_interval=50, max_steps=args.max_steps, seed=seed)[0])
                results[name].append(result)
                print(f"seed {seed} {name:32} {results[name][-1]}", flush=True)
    print("| choice | bits per byte | seconds | tokens | steps |\n|---|---|---|---|---|")
    for name, runs in results.items():
        values, last = [run["val_bpb"] for run in runs], runs[-1]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"| {name} | {statistics.mean(values):.4f} ± {spread:.4f} | {seconds:.0f} | {last['tokens']:,} | "
              f"{last['steps']:,} |")
    amount = f"_{args.seconds:g}s" if args.seconds else f"_{args.tokens / 1e6:g}M" if args.tokens else ""
    save_result(f"quality_{args.choices}{amount}", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--changed"]:
        run_main(lambda: train_changed(sys.argv[2], sys.argv[3:]))
    else:
        run_main(main)
