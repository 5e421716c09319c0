"""`scripts/train_tokenizer.py`, where MiniMind has it."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_path(f"{sys.path[0]}/scripts/train_tokenizer.py", run_name="__main__")
