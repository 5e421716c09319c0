"""`eval_toolcall.py` of the repository, where MiniMind has it."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_path(f"{sys.path[0]}/eval_toolcall.py", run_name="__main__")
