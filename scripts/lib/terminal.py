"""A conversation in the terminal: shared by eval_llm.py, eval_toolcall.py and chat_api.py."""

import sys

from model.cli import Failure, UserError, read_line

HELP = "/clear forgets the conversation, /exit leaves, Ctrl-C stops an answer"


class AnswerPrinter:
    """Prints the events of one answer while it is written: thinking dimmed, each part on a line of its own."""

    previous = ""  # kind of the last event

    def __call__(self, kind: str, value: str | dict) -> None:
        is_call = kind in ("tool_call", "malformed")
        begins_line = is_call or self.previous not in ("", kind)
        if is_call:
            value = f"[{kind}] {value}"
        if kind == "reasoning" and sys.stdout.isatty():
            value = f"\033[2m{value}\033[0m"
        print("\n" * begins_line + value, end="", flush=True)
        self.previous = kind


def interact(chat) -> None:
    """Read lines and let `chat.answer` each, until /exit or the end of input; /clear empties `chat.messages`."""
    print(HELP)
    while True:
        try:
            text = read_line("\n> ").strip()
        except KeyboardInterrupt:
            print(f"\n({HELP})", end="")
            continue
        except EOFError:
            return print()
        if text == "/exit":
            return
        if text == "/clear":
            chat.messages.clear()
        elif text:
            try:
                chat.answer(text)
            except Failure as error:
                if not (isinstance(error, UserError) or sys.stdin.isatty()):
                    raise  # a script wants the exit status
                print(f"{error}; {HELP}")
