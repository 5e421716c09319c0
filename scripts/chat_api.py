"""Talk to an OpenAI-compatible server: an example client with streaming, thinking and tools.

    python scripts/serve_openai_api.py                             # in another terminal
    python scripts/chat_api.py                                     # interactive; /clear forgets, /exit leaves
    python scripts/chat_api.py --prompt "How long is the text \"red apple\"?" --tools
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import openai

from model.cli import Parser, UserError, nonneg_float, positive_int, run_main
from trainer.rl.tools import MOCKED, SCHEMAS, call_tool


def stream_answer(client: openai.OpenAI, messages: list[dict], args: argparse.Namespace) -> dict:
    """Print an answer while it is written; → it as a message, to append to the conversation."""
    given = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
    options = {key: value for key, value in given.items() if value is not None}
    if args.tools:
        options["tools"] = [SCHEMAS[name] for name in args.tools]
    said: dict[str, str] = {"reasoning_content": "", "content": ""}
    calls: list[dict] = []
    chunks = client.chat.completions.create(model=args.model, messages=messages, stream=True,
                                            extra_body={"open_thinking": args.open_thinking}, **options)
    for chunk in chunks:
        delta = chunk.choices[0].delta
        for part in said:
            if text := getattr(delta, part, None):
                dim = part == "reasoning_content" and sys.stdout.isatty()
                print(f"\033[2m{text}\033[0m" if dim else text, end="", flush=True)
                said[part] += text
        for piece in delta.tool_calls or ():
            if piece.index == len(calls):
                function = {"name": piece.function.name, "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[piece.index]["function"]["arguments"] += piece.function.arguments or ""
    print()
    message = {"role": "assistant", **{part: text for part, text in said.items() if text or part == "content"}}
    return message | ({"tool_calls": calls} if calls else {})


def chat(client: openai.OpenAI, messages: list[dict], args: argparse.Namespace, rounds: int = 5) -> None:
    """Answer the last message, running the tools that the model calls, at most `rounds` times."""
    for _ in range(rounds):
        messages.append(stream_answer(client, messages, args))
        for call in messages[-1].get("tool_calls", ()):
            result = json.dumps(call_tool(**call["function"]), ensure_ascii=False)
            print(f"[{call['function']['name']} {call['function']['arguments']} → {result}]")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if messages[-1]["role"] != "tool":
            return


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_url", default="http://127.0.0.1:8998/v1", help="of the server (%(default)s)")
    parser.add_argument("--api_key", default=os.environ.get("MINIMIND_API_KEY", "none"),
                        help="if the server wants one (default: $MINIMIND_API_KEY)")
    parser.add_argument("--model", default="minimind", help="name of the model (%(default)s)")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--tools", action="store_const", const=list(SCHEMAS), default=[],
                        help=f"offer {', '.join(SCHEMAS)}; what {', '.join(MOCKED)} say is invented")
    parser.add_argument("--open_thinking", type=int, choices=(0, 1), default=0, help="let the model think first")
    parser.add_argument("--temperature", type=nonneg_float, help="0 takes the likeliest token (default: the server's)")
    parser.add_argument("--max_new_tokens", type=positive_int, help="longest answer, in tokens (default: the server's)")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
    messages: list[dict] = []
    with friendly_errors(args.base_url):
        while True:
            try:
                text = args.prompt or input("\n> ").strip()
            except EOFError:
                return
            if text == "/exit":
                return
            if text == "/clear":
                messages.clear()
            elif text:
                messages.append({"role": "user", "content": text})
                chat(client, messages, args)
            if args.prompt:
                return


@contextmanager
def friendly_errors(base_url: str) -> Iterator[None]:
    """What the client raises as UserError."""
    try:
        yield
    except openai.APIConnectionError:
        raise UserError(f"no server at {base_url}; start one: python scripts/serve_openai_api.py") from None
    except openai.APIError as error:
        raise UserError(f"the server says: {error.message}") from None


if __name__ == "__main__":
    run_main(main)
