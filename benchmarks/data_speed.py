"""How fast and in how much memory a large file becomes tokens, and how soon the second start has them.

The file is real text: the rows of --data_path over and over, each with a number of its own. Each start is a process of
its own, so that its peak memory is its own. Before that, tiktoken and the tokenizers library take the same texts on all
cores, and have to give the same ids.

    python benchmarks/data_speed.py --gigabytes 1
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import numpy as np
import torch

from benchmarks.machine import save_result
from dataset.lm_dataset import PretrainDataset
from dataset.reader import read_rows
from dataset.token_cache import encode, map_ahead
from model.chat import ChatTokenizer
from model.cli import Parser, nonneg_float, num_positions, run_main
from model.device import peak_memory
from model.weights import ROOT

CPU = torch.device("cpu")


def write_corpus(path: Path, source: Path, size: float) -> None:
    """Write at least `size` bytes of jsonl."""
    number = 0
    with open(path, "wb") as file:
        while file.tell() < size:
            for _, row in read_rows(source):
                number += 1
                numbered = {"text": f"{number} {row['text']}"}
                file.write(json.dumps(numbered, ensure_ascii=False).encode() + b"\n")
                if file.tell() >= size:
                    break


def start(path: Path, max_seq_len: int) -> dict:
    """Build the dataset and say what it took."""
    imports_gb, begin = peak_memory(CPU), time.perf_counter()
    data = PretrainDataset(path, ChatTokenizer(), max_seq_len, cache_dir=path.parent / "cache")
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 2), "cpu_seconds": round(sum(os.times()[:4]), 1),  # its own and its children's
            "memory_gb": round(peak_memory(CPU), 3),
            "memory_gb_after_imports": round(imports_gb, 3), "documents": data.meta["documents"],
            "tokens": data.meta["tokens"], "rows": len(data), "fill": round(data.utilization, 4)}


def compare_libraries(source: Path) -> dict[str, float]:
    """MB/s of text to ids in memory, by library."""
    texts = [row["text"] for _, row in itertools.islice(read_rows(source), 20_000)]
    megabytes, speeds, ids = sum(len(text.encode()) for text in texts) / 1e6, {}, {}
    chunks = [texts[i:i + 500] for i in range(0, len(texts), 500)]
    for library in ("tokenizers", "tiktoken"):
        tokenizer = ChatTokenizer()
        if library == "tokenizers":
            tokenizer._tiktoken = None  # as where it is not installed
        elif tokenizer._tiktoken is None:
            continue
        begin = time.perf_counter()
        arrays = list(map_ahead(lambda chunk, tokenizer=tokenizer: encode(
            tokenizer, [[(text, True)] for text in chunk])[0], chunks))
        speeds[library] = round(megabytes / (time.perf_counter() - begin), 2)
        ids[library] = np.concatenate(arrays)
    assert all(np.array_equal(other, ids["tokenizers"]) for other in ids.values())
    return speeds


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=nonneg_float, default=1.0, help="10^9 bytes of the file (default: 1)")
    parser.add_argument("--data_path", type=Path, default=ROOT.parent / "shared/data/pretrain.jsonl.gz",
                        help="pretraining rows to repeat (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=num_positions, default=340, help="tokens in a row (default: 340)")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # read this file here and print the numbers
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.max_seq_len)))
        return
    libraries = compare_libraries(args.data_path)
    print("text to ids:", ", ".join(f"{library} {speed} MB/s" for library, speed in libraries.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        write_corpus(path, args.data_path, args.gigabytes * 1e9)
        megabytes = path.stat().st_size / 1e6
        command = [sys.executable, *sys.argv, f"--start={path}"]
        first, second = (json.loads(subprocess.check_output(command)) for _ in range(2))
    speed = round(megabytes / first["seconds"], 2)
    print(f"data_speed: {megabytes:,.0f} MB, {first['tokens']:,} tokens: {first['seconds']:,} s, {speed} MB/s, "
          f"at most {first['memory_gb']:.2f} GB of memory; second start {second['seconds']} s")
    save_result("data_speed", {"megabytes": round(megabytes, 1), "megabytes_per_second": speed, "first_start": first,
                               "second_start": second,
                               "text_to_ids_megabytes_per_second": libraries})


if __name__ == "__main__":
    run_main(main)
