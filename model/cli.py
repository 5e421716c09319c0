"""What every program shares: errors that end in one line, and the types of command-line arguments."""

import argparse
import sys
from collections.abc import Callable


class Failure(Exception):
    """What ends a program with one line. Not the user's doing: exit status 1."""

    status = 1


class UserError(Failure):
    """A mistake of the user's: exit status 2."""

    status = 2


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def run_main(main: Callable[[], None]) -> None:
    """Run a program's `main`, turning what users can cause into one line and an exit status.

    2: UserError. 1: what is not the user's (disk full, out of memory, diverged). 130: interrupted.
    """
    try:
        main()
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:
        print(f"error: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line."""

    def error(self, message: str) -> None:
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def nonneg_int(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def nonneg_float(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)
