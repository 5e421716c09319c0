"""What every program shares: errors that end in one line, and the types of command-line arguments."""

import argparse
import os
import sys
from collections.abc import Callable

SWITCH = {"type": int, "choices": (0, 1)}  # keyword arguments of `add_argument` for a flag that is 0 or 1


class Failure(Exception):
    """Ends a program with one line and exit status 1: something failed that the user did not cause."""

    status = 1


class UserError(Failure):
    """Ends a program with one line and exit status 2: a mistake of the user, what, where and how to fix it."""

    status = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def notice(text: str) -> None:
    """A line on stderr, of the first rank only, about something that was chosen for the user."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def run_main(main: Callable[[], None]) -> None:
    """Run a program's `main`; expected errors end it with one line on stderr and an exit status.

    2: UserError. 1: other failures (disk full, out of memory, diverged). 130: interrupted.
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

    def add_aliases(self, **flags: str | None) -> None:
        """Also accept flags by their names in MiniMind's scripts, alias="flag"; --help does not list them.

        None: there is nothing that the flag could change here. It may have a value, which is ignored.
        """
        for alias, flag in flags.items():
            if flag:
                self._option_string_actions[f"--{alias}"] = self._option_string_actions[f"--{flag}"]
            else:
                self.add_argument(f"--{alias}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


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


def optional_name(text: str) -> str | None:
    return None if text == "None" else text


def boolean(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise argparse.ArgumentTypeError(f"{text} is not True or False")
    return text.lower() in ("1", "true")


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


SAMPLING_ARGS = {
    "open_thinking": {"type": int, "choices": (0, 1), "help": "let the model think first"},
    "max_new_tokens": {"type": positive_int, "help": "longest answer, in tokens"},
    "temperature": {"type": nonneg_float, "help": "of sampling; 0 takes the likeliest token"},
    "top_p": {"type": fraction, "help": "sample from the likeliest tokens of this total probability"},
    "top_k": {"type": nonneg_int, "help": "sample from this many of the likeliest tokens; 0: off"},
    "repetition_penalty": {"type": nonneg_float, "help": "above 1: repeat less; 1: off"},
    "seed": {"type": nonneg_int, "help": "of sampling"},
}


def add_sampling_args(parser: argparse.ArgumentParser, **defaults) -> None:
    """Flags of sampling: those that `defaults` name, with these defaults; None where something else decides."""
    for name, default in defaults.items():
        options = SAMPLING_ARGS[name] | {"default": default}
        if default is not None:
            options["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{name}", **options)
