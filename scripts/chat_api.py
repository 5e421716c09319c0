"""Talk to an OpenAI-compatible server: an example client with streaming, thinking and tools.

    python scripts/serve_openai_api.py                             # in another terminal
    python scripts/chat_api.py                                     # interactive; /clear forgets, /exit leaves
    python scripts/chat_api.py --prompt "How long is the text \"red apple\"?" --tools
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.chat import AssistantMessage
from model.cli import Failure, Parser, add_sampling_args, run_main
from scripts.lib.openai_client import ChatClient, add_endpoint_args, arguments_text, as_strict
from scripts.lib.terminal import AnswerPrinter, interact
from trainer.rl.builtin_tools import MOCKED
from trainer.rl.tools import SCHEMAS, call_offered_tool


class ApiChat:
    """A conversation with a model behind a server; it goes on by itself as long as the model calls tools.

    `strict`: the server keeps its tool calls valid. `options` are those of a request: temperature, max_tokens, …
    """

    def __init__(self, client: ChatClient, tools: list[str], max_turns: int = 5, strict: bool = False,
                 **options):
        self.client, self.tool_names, self.max_turns, self.options = client, tools, max_turns, options
        schemas = [SCHEMAS[name] for name in tools]
        self.tools = as_strict(schemas) if strict else schemas
        self.messages: list[dict] = []

    def answer(self, text: str) -> None:
        """Print the answer to `text` while it is written, and remember both. Ctrl-C ends it early."""
        num_messages = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            for _ in range(self.max_turns):
                calls = self._reply()
                for call in calls:
                    result = json.dumps(call_offered_tool(**call, offered=self.tool_names), ensure_ascii=False)
                    print(f"[{call['name']} {arguments_text(call['arguments'])} → {result}]")
                    self.messages.append({"role": "tool", "content": result})
                if not calls:
                    return
        except Failure:
            del self.messages[num_messages:]
            raise

    def _reply(self) -> list[dict]:
        """Print the model's next message and append it. → its tool calls"""
        answer, print_event = AssistantMessage(), AnswerPrinter()
        try:
            for kind, value in self.client.stream(self.messages, self.tools, **self.options):
                if kind == "tool_call":
                    answer.tool_calls.append(value)
                elif kind in ("content", "reasoning"):
                    setattr(answer, kind, getattr(answer, kind) + value)
                    print_event(kind, value)
                elif kind == "malformed":
                    print_event(kind, value)
        except KeyboardInterrupt:
            print(" …", end="")
        print()
        self.messages.append(answer.to_dict())
        return answer.tool_calls


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_endpoint_args(parser, "MINIMIND_API_KEY")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--tools", action="store_const", const=list(SCHEMAS), default=[],
                        help=f"offer {', '.join(SCHEMAS)}; the results of {', '.join(MOCKED)} are invented")
    add_sampling_args(parser, open_thinking=None, temperature=None, max_new_tokens=None)
    args = parser.parse_args()
    client = ChatClient(args.base_url, args.api_key, args.model, send_reasoning=True)
    chat = ApiChat(client, args.tools, temperature=args.temperature, max_tokens=args.max_new_tokens,
                   extra_body=None if args.open_thinking is None else {"open_thinking": args.open_thinking})
    if args.prompt:
        chat.answer(args.prompt)
    else:
        interact(chat)


if __name__ == "__main__":
    run_main(main)
