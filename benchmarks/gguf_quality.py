"""What quantised GGUF files cost: bits per byte of a text, and megabytes, for each dtype of convert_model.py.

The weights are read back from each file and run in our decoder; that llama.cpp computes the same from them is tested
(tests/test_convert.py).

    python benchmarks/gguf_quality.py --weight out/pretrain_128.pth --text dataset/sample/pretrain_val.jsonl
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.machine import save_result
from model.cli import Parser, num_positions, run_main
from model.loading import load_native
from scripts.eval_benchmark import measure_texts, read_texts
from scripts.lib.gguf_file import KINDS, read_gguf, write_gguf


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=Path, required=True, help="a .pth")
    parser.add_argument("--text", type=Path, required=True, help="held-out text: rows, or plain text")
    parser.add_argument("--max_seq_len", type=num_positions, default=1024, help="tokens that one sees (%(default)s)")
    args = parser.parse_args()
    model, tokenizer, _ = load_native(args.weight)
    texts, results = read_texts(args.text), {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in KINDS:
            path = Path(folder) / f"{dtype}.gguf"
            write_gguf(model, path, tokenizer, dtype)
            scores = measure_texts(read_gguf(path, model.config).eval(), tokenizer, texts, args.max_seq_len)
            results[dtype] = {"bits_per_byte": scores["bits_per_byte"], "megabytes": path.stat().st_size / 1e6}
            print(f"{dtype:5} {results[dtype]['bits_per_byte']:.4f} bits per byte, "
                  f"{results[dtype]['megabytes']:.2f} MB", flush=True)
    save_result("gguf_quality", results)


if __name__ == "__main__":
    run_main(main)
