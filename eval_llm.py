"""Talk to a model in the terminal: interactively, with --prompt, or with the built-in --questions."""

import argparse
import sys
import time
from functools import partial

import torch

from model.chat import BOS, AssistantMessage, ChatTokenizer, MessageParser
from model.cli import Parser, UserError, fraction, nonneg_float, nonneg_int, positive_int, run_main
from model.inference.engine import Engine, Sampling
from model.loading import add_loading_args, load_from_args

QUESTIONS = ("你好，你是谁？", "你有什么特长？", "为什么天空是蓝色的？", "请介绍一下北京。", "推荐一些中国的美食。",
             "Who are you?", "What is machine learning?", "Why does it rain?", "Give me tips for learning English.")
TEXTS = ("很久以前，", "机器学习是", "Once upon a time, ", "The capital of France")
HELP = "/clear forgets the conversation, /exit leaves, Ctrl-C stops an answer"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weight", default="full_sft",
                        help="name of the weight; 'pretrain…' continues text, others chat")
    add_loading_args(parser)
    parser.add_argument("--prompt", nargs="+", help="answer this, or each of these by itself, and exit")
    parser.add_argument("--questions", action="store_true", help="answer the built-in questions and exit")
    parser.add_argument("--open_thinking", type=int, choices=(0, 1), default=0, help="let the model think first")
    parser.add_argument("--max_new_tokens", type=positive_int, default=1024, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=nonneg_float, default=0.85, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=fraction, default=0.95,
                        help="sample from the likeliest tokens of this probability")
    parser.add_argument("--top_k", type=nonneg_int, default=0,
                        help="sample from so many of the likeliest tokens; 0: off")
    parser.add_argument("--repetition_penalty", type=nonneg_float, default=1.0, help="above 1: repeat less; 1: off")
    parser.add_argument("--seed", type=nonneg_int, help="of sampling (another one each time by default)")
    return parser.parse_args()


class Chat:
    """A conversation with a model, or, with a pretrained weight, texts it continues one by one."""

    def __init__(self, model: torch.nn.Module, tokenizer: ChatTokenizer, args: argparse.Namespace):
        self.tokenizer, self.args = tokenizer, args
        self.new_engine = partial(Engine, model, tokenizer, max_batch=1)
        self.engine = self.new_engine()  # remembers what it has read: earlier turns are not computed again
        self.continues_text = args.load_from == "model" and args.weight.startswith("pretrain")
        self.messages: list[dict] = []
        self.said = AssistantMessage()  # last

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it is written, and remember both. Ctrl-C ends it early."""
        if self.continues_text:
            self.reply([BOS, *self.tokenizer.encode_text(text)])
        else:
            self.messages.append({"role": "user", "content": text})
            self.reply(self.tokenizer.prompt(self.messages, open_thinking=bool(self.args.open_thinking)))

    def reply(self, prompt: list[int]) -> None:
        args, thinks = self.args, bool(self.args.open_thinking) and not self.continues_text
        seed = args.seed if args.seed is not None else time.time_ns() % 2**31
        try:
            sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, seed=seed,
                                repetition_penalty=args.repetition_penalty)
            sequence = self.engine.add(prompt, sampling)
        except ValueError as error:
            del self.messages[-1:]
            raise UserError(error) from None
        parser, shown, began = MessageParser(self.tokenizer, thinks), 0, time.perf_counter()
        try:
            while self.engine.busy:
                self.engine.step()
                for event in parser.feed(sequence.said[shown:]):
                    show(*event)
                shown = len(sequence.said)
        except KeyboardInterrupt:
            self.engine = self.new_engine()  # the old one may have stopped in the middle of a step
            print(" …", end="")
        for event in parser.finish():
            show(*event)
        count = len(sequence.ids)
        speed = count / (time.perf_counter() - began)
        print(f"\n[{count} tokens, {speed:.1f} tokens/s]" if sys.stdout.isatty() else "")
        self.said = parser.message
        if not self.continues_text:
            self.messages.append(self.said.to_dict())


def show(kind: str, value: str | dict) -> None:
    """Print one event of an answer: thinking dimmed, calls on a line of their own."""
    if kind == "reasoning" and sys.stdout.isatty():
        value = f"\033[2m{value}\033[0m"
    if kind in ("tool_call", "malformed"):
        value = f"\n[{kind}] {value}"
    print(value, end="", flush=True)


def interact(chat: Chat) -> None:
    print(HELP)
    while True:
        try:
            text = input("\n> ").strip()
        except KeyboardInterrupt:
            print(f"\n({HELP})", end="")
            continue
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/clear":
            chat.messages.clear()
        elif text:
            try:
                chat.answer(text)
            except UserError as error:
                print(f"{error}; {HELP}")


def main() -> None:
    args = parse_arguments()
    chat = Chat(*load_from_args(args, args.weight), args)
    if not args.prompt and not args.questions:
        return interact(chat)
    asked = args.prompt or (TEXTS if chat.continues_text else QUESTIONS)
    if not all(map(str.strip, asked)):
        raise UserError("--prompt is empty")
    for question in asked:
        if len(asked) > 1:
            print(f"\n> {question}")
        chat.messages.clear()
        chat.answer(question)


if __name__ == "__main__":
    run_main(main)
