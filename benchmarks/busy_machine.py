"""Training speed beside other busy programs: the number of threads adapted and not, in turn, in one run.

The model and the flags of the demo, on the sample world. A busy program is an endless loop in Python.

    python benchmarks/busy_machine.py
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.machine import save_result, train
from model.cli import Parser, nonneg_int, positive_int, run_main
from model.weights import ROOT

FLAGS = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_seq_len": 1024, "batch_size": 2, "accumulation_steps": 1, "optimizer": "muon", "learning_rate": 4e-3,
         "use_compile": 1, "epochs": 99, "log_interval": 10, "from_weight": "none", "device": "cpu"}


def speed(data: Path, num_busy: int, adapt: int, steps: int) -> float:
    """Median tokens/s of the second half of the log lines: the first compiles, and chooses the threads."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = FLAGS | {"data_path": data, "cache_dir": data.parent, "max_steps": steps, "adapt_threads": adapt}
            rows, _ = train([ROOT / "trainer/train_pretrain.py"], flags, Path(folder))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    speeds = [row["tokens_per_s"] for row in rows]
    return statistics.median(speeds[len(speeds) // 2:])


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=nonneg_int, nargs="+", default=[0, 1, 2], help="busy programs beside")
    parser.add_argument("--steps", type=positive_int, default=120, help="of each run")
    args = parser.parse_args()
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "dataset/sample_world.py", "--out", folder], check=True,
                       stdout=subprocess.DEVNULL)
        data = Path(folder) / "pretrain.jsonl"
        for num_busy in args.busy:
            fixed, adapted = (speed(data, num_busy, adapt, args.steps) for adapt in (0, 1))
            results[str(num_busy)] = {"fixed": fixed, "adapted": adapted, "ratio": adapted / fixed}
            alone = results[str(args.busy[0])]["fixed"]
            print(f"{num_busy} busy programs: fixed {fixed:8,.0f} tokens/s ({fixed / alone:.2f} of that alone), "
                  f"adapted {adapted:8,.0f} ({adapted / alone:.2f}), ratio {adapted / fixed:.2f}", flush=True)
    save_result("busy_machine", results)


if __name__ == "__main__":
    run_main(main)
