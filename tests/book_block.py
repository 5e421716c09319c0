"""Runs one command of the book, in a process that a fork server has prepared: importing torch once saves seconds."""

import os
import runpy
import sys
import traceback
from pathlib import Path


def run(arguments: list[str], root: Path, log: Path) -> None:
    """`python {arguments}` in the copy of the repository `root`; what it prints goes to `log`."""
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(root)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than the tiny run
    sys.path[0] = str((root / arguments[0]).parent)
    sys.argv = arguments
    try:
        if arguments[0] == "-c":
            exec(arguments[1], {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.path[0], sys.argv = str(root), arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
