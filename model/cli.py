"""What every program shares: errors that end in one line, terminals of any encoding, and the types of flags."""

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

SWITCH = {"type": int, "choices": (0, 1)}  # keyword arguments of `add_argument` for a flag that is 0 or 1
SURROGATE = re.compile("[\ud800-\udfff]")  # U+DC80 to U+DCFF stand for bytes that could not be decoded
OUTPUTS = ("out", "json", "picture")  # flags of files that are written
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")  # of torch on a CPU, on CUDA and MPS
CHINESE = re.compile("[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")


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

    2: UserError. 1: other failures (disk full, out of memory, diverged). 130: interrupted. 141: nobody reads stdout any
    more, as in `| head -1`.
    """
    open_streams()
    try:
        main()
    except Failure as error:
        exit_with(error.status, f"error: {error}")
    except OSError as error:
        if error.filename is None and error.errno in (errno.EPIPE, *[errno.EINVAL] * (os.name == "nt")):
            exit_with(141)
        exit_with(1, f"error: {error.filename or ''} {error.strerror or error}".replace("  ", " "))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        exit_with(1, f"error: out of memory for these sizes ({first_line(error)})")
    except KeyboardInterrupt:
        exit_with(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # reported, or nobody reads it: else the interpreter reports it again when it ends
                with suppress(OSError), open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())


def exit_with(status: int, line: str = "") -> None:
    with suppress(OSError):  # stderr may be closed too
        print(line, file=sys.stderr, end="\n" * bool(line), flush=True)
    sys.exit(status)


def open_streams() -> None:
    """Make stdin, stdout and stderr usable whatever the terminal's encoding is, and where they are closed.

    Characters that stdout's encoding lacks are printed as "?". What stdin's lacks is for `read_line` to decode.
    """
    for name, mode, errors in (("stdin", "r", "surrogateescape"), ("stdout", "w", "replace"), ("stderr", "w", None)):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (`<&-`), or there is none (pythonw)
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if os.name == "nt":
        os.system("")  # from here on a console of Windows knows colours


def read_line(prompt: str) -> str:
    """`input`, which also reads bytes that are not of the terminal's encoding, and says how.

    They are taken for UTF-8, or for GB2312 where that gives Chinese text; else U+FFFD stands for what is unreadable.
    """
    text = input(prompt)
    if not SURROGATE.search(text):
        return text
    encoding = sys.stdin.encoding or "utf-8"
    text, name = decode(text.encode(encoding, "surrogateescape"))
    notice(f"(that was not {encoding}; it is read as {name}: {text})")
    return text


def decode(line: bytes) -> tuple[str, str]:
    """Bytes of an unknown encoding → their text, and the name of the encoding."""
    text = line.decode("utf-8", "replace")
    if text.count("\ufffd") > len(CHINESE.findall(text)):  # else a character of UTF-8 was cut
        with suppress(UnicodeDecodeError):
            other = line.decode("gb2312")  # in GBK two letters of Latin-1 may be Chinese
            if all(character.isascii() or CHINESE.match(character) for character in other):
                return other, "GB2312"
    return text, "UTF-8"


def flatten(values: object) -> list:
    """The values of a flag, which may be lists of lists."""
    return [value for part in values for value in flatten(part)] if isinstance(values, list) else [values]


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line."""

    def parse_known_args(self, args=None, namespace=None):
        broken = next(filter(SURROGATE.search, sys.argv[1:] if args is None else args), None)
        if broken is not None:
            self.error(f"argument {broken!a}: not text in {sys.getfilesystemencoding()}, the terminal's encoding")
        args, unknown = super().parse_known_args(args, namespace)
        for name in OUTPUTS:
            for other, values in vars(args).items():
                for value in flatten(values):
                    if not isinstance(value, (str, os.PathLike)):  # os takes a number for an open file
                        continue
                    with suppress(OSError, TypeError, ValueError):  # not files
                        if other != name and os.path.samefile(getattr(args, name, None), value):
                            self.error(f"--{name} {value} is what --{other} reads, and would be lost; name another")
        return args, unknown

    def error(self, message: str) -> None:
        exit_with(2, f"error: {message} (--help lists the flags)")

    def note_unused(self, args: argparse.Namespace, flags: Iterable[str], condition: str) -> None:
        """Print a notice for each of `flags` that was given without effect, saying when it has one: "with --x"."""
        for flag in flags:
            if getattr(args, flag) != self.get_default(flag):
                notice(f"--{flag} is not used: it has an effect {condition}")

    def add_aliases(self, **flags: str | None) -> None:
        """Also accept flags by their names in MiniMind's scripts, alias="flag"; --help does not list them.

        None: there is nothing that the flag could change here. It may have a value, which is ignored.
        """
        for alias, flag in flags.items():
            if flag:
                self._option_string_actions[f"--{alias}"] = self._option_string_actions[f"--{flag}"]
            else:
                self.add_argument(f"--{alias}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag that is a whole number between two bounds, both included."""
    def parse(text: str) -> int:
        with suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from {least:,} to {most:,}")
    return parse


nonneg_int, positive_int = whole_number(0), whole_number(1)
seed_int, port_number = whole_number(0, 2**64 - 1), whole_number(0, 65_535)
num_positions = whole_number(1, 2**20)  # of a row; tables of this size are allocated


def nonneg_float(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number from 0 to 1e9")


def positive_float(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number above 0, at most 1e9")


def optional_name(text: str) -> str | None:
    return None if text == "None" else text


def boolean(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true"):
        raise argparse.ArgumentTypeError(f"{text} is not True or False")
    return text.lower() in ("1", "true")


def fraction(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number between 0 and 1")


SAMPLING_ARGS = {
    "open_thinking": {"type": int, "choices": (0, 1), "help": "1: let the model think before it answers"},
    "max_new_tokens": {"type": positive_int, "help": "maximum length of an answer, in tokens"},
    "temperature": {"type": nonneg_float, "help": "sampling temperature; 0: greedy"},
    "top_p": {"type": fraction, "help": "sample from the most probable tokens with this total probability"},
    "top_k": {"type": nonneg_int, "help": "sample from this many of the most probable tokens; 0: off"},
    "repetition_penalty": {"type": nonneg_float, "help": "penalty on tokens that occurred before; 1: off"},
    "seed": {"type": seed_int, "help": "random seed of the sampling"},
}


def add_sampling_args(parser: argparse.ArgumentParser, **defaults) -> None:
    """Flags of sampling: those that `defaults` name, with these defaults; None where something else decides."""
    for name, default in defaults.items():
        options = SAMPLING_ARGS[name] | {"default": default}
        if default is not None:
            options["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{name}", **options)
