"""Terminals: bytes and characters that their encoding lacks, closed pipes, and none at all end in one line at most."""

import os
import subprocess
import sys

import pytest
from lab import ROOT

from model.cli import decode
from scripts.lib.terminal import AnswerPrinter

PROGRAM = """
from model.cli import Parser, run_main
from scripts.lib.terminal import interact

class Echo:
    messages = []

    def answer(self, text):
        print(f"✅ {text}", flush=True)

def main():
    parser = Parser()
    parser.add_argument("--prompt")
    interact(Echo()) if not parser.parse_args().prompt else Echo().answer("prompt")

run_main(main)
"""
posix_only = pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")


def run(stdin: bytes = b"", *args: bytes | str, encoding: str = "utf-8:strict", **options):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *args], input=stdin, cwd=ROOT,
                          env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""},
                          **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
    return done.returncode, (done.stdout or b"").decode(encoding.split(":")[0]), (done.stderr or b"").decode()


@pytest.mark.parametrize("line, text", [
    ("你好", "你好"), ("你好，世界！".encode("gbk"), "你好，世界！"), ("café".encode("latin-1"), "caf\ufffd"),
    ("你好".encode()[:-1], "你\ufffd"), ("你好！你".encode()[:-1], "你好！\ufffd"), (b"\xff\xfe\0", "\ufffd\ufffd\0"),
    ("Ünïted".encode("latin-1"), "\ufffdn\ufffdted"), ("姲帩泝".encode()[:-1], "姲帩\ufffd"),  # in GB2312: 濮插俯娉
])  # fmt: skip
def test_bytes_of_another_encoding_are_read_as_chinese_or_replaced(line, text):
    assert decode(line if isinstance(line, bytes) else line.encode())[0] == text


@pytest.mark.parametrize("encoding, stdin, answers, num_notices", [
    ("utf-8:strict", "你好\n".encode("gbk"), ["✅ 你好", "✅ hi"], 1),
    ("utf-8:strict", b"\xc4\n", ["✅ \ufffd", "✅ hi"], 1),
    ("gbk", "你好\n".encode("gbk"), ["? 你好", "? hi"], 0),  # GBK has no ✅
    ("cp1252:strict", b"caf\xe9\n", ["? café", "? hi"], 0),
    ("ascii", "你好\n".encode(), ["? ??", "? hi"], 1),
])  # fmt: skip
def test_the_conversation_goes_on_in_every_encoding(encoding, stdin, answers, num_notices):
    status, out, err = run(stdin + b"hi\n/exit\n", encoding=encoding)
    assert status == 0
    assert [line.removeprefix("> ") for line in out.splitlines() if line.startswith("> ")][:2] == answers
    assert len(err.splitlines()) == num_notices and "Traceback" not in err


def test_an_argument_that_is_not_text_is_named():
    status, out, err = run(b"", "--prompt", b"a\xff" if os.name != "nt" else "a\udcff")
    assert (status, out, len(err.splitlines())) == (2, "", 1) and r"'a\udcff'" in err


def test_a_reader_that_leaves_ends_the_program_in_silence():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as closed:
        assert run(b"hi\n", stdout=closed) == (141, "", "")
        assert run(b"", "--help", stdout=closed) == (0, "", "")
        assert run(b"", "--nonsense", stderr=closed) == (2, "", "")


def test_each_part_of_an_answer_begins_on_a_line_of_its_own(capsys):
    print_event = AnswerPrinter()
    for event in (("reasoning", "2 + 2 "), ("reasoning", "= 4"), ("content", "It is "), ("content", "4."),
                  ("tool_call", {"name": "add"}), ("tool_call", {"name": "sub"}), ("content", "Done.")):
        print_event(*event)
    assert capsys.readouterr().out.splitlines() == [
        "2 + 2 = 4", "It is 4.", "[tool_call] {'name': 'add'}", "[tool_call] {'name': 'sub'}", "Done."]


@posix_only
@pytest.mark.parametrize("redirection", ["<&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_empty_ones(redirection):
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this device")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "wb") as full:
        status, _, err = run(b"hi\n", stdout=full)
    assert status == 1 and err == "error: No space left on device\n"
