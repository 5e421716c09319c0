"""Talk to a model in the terminal: interactively, with --prompt, or with the built-in --questions."""

import argparse
import sys
import time
from functools import partial

import torch

from model.chat import BOS, AssistantMessage, ChatTokenizer, MessageParser
from model.cli import SWITCH, Parser, UserError, add_sampling_args, nonneg_int, notice, run_main, whole_number
from model.inference.constraints import Grammar
from model.inference.engine import Engine, SamplingParams
from model.loading import add_loading_args, continues_text, load_from_args
from scripts.lib.terminal import AnswerPrinter, interact

QUESTIONS = ("你好，你是谁？", "你有什么特长？", "为什么天空是蓝色的？", "请介绍一下北京。", "推荐一些中国的美食。",
             "Who are you?", "What is machine learning?", "Why does it rain?", "Give me tips for learning English.")
MODES = ("pretrain", "full_sft", "dpo", "reason", "ppo_actor", "grpo")  # weights, as MiniMind2 numbered them
TEXTS = ("很久以前，", "机器学习是", "Once upon a time, ", "The capital of France")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weight", default="full_sft",
                        help="name of the weights; 'pretrain…' continues text, others chat")
    add_loading_args(parser)
    parser.add_argument("--prompt", nargs="+", help="answer this, or each of these by itself, and exit")
    add_chat_args(parser)
    parser.add_argument("--questions", action="store_true", help="answer the built-in questions and exit")
    add_sampling_args(parser, open_thinking=0, max_new_tokens=8192, temperature=0.85, top_p=0.95, top_k=0,
                      repetition_penalty=1.0, seed=None)
    parser.add_aliases(max_seq_len="max_new_tokens")
    mode = whole_number(0, len(MODES) - 1)
    parser.add_argument("--model_mode", dest="weight", type=lambda text: MODES[mode(text)], default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS)  # MiniMind2's
    args = parser.parse_args()
    if args.prompt or args.questions:
        parser.note_unused(args, ("history",), "in a conversation")
    if args.prompt:
        parser.note_unused(args, ("questions",), "without --prompt")
    return args


def add_chat_args(parser: Parser) -> None:
    """Flags of a conversation in the terminal."""
    parser.add_argument("--history", type=nonneg_int, help="messages of the conversation to remember (default: all)")
    parser.add_argument("--show_speed", **SWITCH, help="print tokens per second (default: on a terminal)")
    parser.add_argument("--use_compile", **SWITCH, default=0, help="torch.compile the decoding step: faster tokens, "
                        "after half a minute of compiling, or seconds once that is cached")
    parser.add_aliases(historys="history", history_cnt="history")


class Chat:
    """A conversation with a model, or, with a pretrained weight, texts it continues one by one."""

    grammar: Grammar | None = None  # that its answers keep to

    def __init__(self, model: torch.nn.Module, tokenizer: ChatTokenizer, args: argparse.Namespace):
        self.tokenizer, self.args = tokenizer, args
        self.new_engine = partial(Engine, model, tokenizer, max_batch=1, adapt_threads=True,
                                  compile=bool(args.use_compile))
        self.engine = self.new_engine()  # keeps what it has computed: earlier turns are not computed again
        self.engine.warm_up()
        self.notices: list[str] = []  # to be printed after the answer
        self.engine.threads.announce = self.notices.append
        self.continues_text = continues_text(args.load_from, args.weight)
        self.messages: list[dict] = []
        self.finish_reason: str | None = None  # of the last answer; None: Ctrl-C

    def answer(self, text: str) -> AssistantMessage:
        """Print the answer to `text` while it is written, and remember both. Ctrl-C ends it early."""
        if self.continues_text:
            return self.reply([BOS, *self.tokenizer.encode_text(text)])
        if self.args.history is not None:
            system = [message for message in self.messages[:1] if message["role"] == "system"]
            turns = self.messages[len(system):]
            self.messages = system + turns[max(0, len(turns) - self.args.history):]
        self.messages.append({"role": "user", "content": text})
        return self.reply_to_messages()

    def drop_question(self) -> None:
        """Remove the last question, which cannot be answered, and what came after it."""
        while self.messages and self.messages.pop()["role"] != "user":
            pass

    def reply_to_messages(self) -> AssistantMessage:
        """Print the answer to the messages, and append it. Raises UserError where no prompt can be made of them."""
        try:
            prompt = self.tokenizer.prompt(self.messages, open_thinking=bool(self.args.open_thinking))
        except ValueError as error:
            self.drop_question()
            raise UserError(error) from None
        return self.reply(prompt)

    def reply(self, prompt: list[int]) -> AssistantMessage:
        """Print what follows `prompt`, and append it to the messages. Raises UserError when the prompt is too long."""
        args, thinking = self.args, bool(self.args.open_thinking) and not self.continues_text
        seed = args.seed if args.seed is not None else time.time_ns() % 2**31  # another one each time
        try:
            sequence = self.engine.add(prompt, SamplingParams(
                args.max_new_tokens, args.temperature, args.top_p, args.top_k, seed=seed,
                repetition_penalty=args.repetition_penalty, grammar=self.grammar))
        except ValueError as error:
            self.drop_question()
            raise UserError(error) from None
        parser, print_event = MessageParser(self.tokenizer, thinking), AnswerPrinter()
        start = time.perf_counter()
        try:
            for delta in self.engine.stream(sequence):
                for event in parser.feed(delta.pieces):
                    print_event(*event)
        except KeyboardInterrupt:
            threads = self.engine.threads
            self.engine = self.new_engine()  # the old one may have stopped in the middle of a step
            self.engine.threads = threads  # which knows how many there are, also if fewer are in use now
            print(" …", end="")
        for event in parser.finish():
            print_event(*event)
        self.finish_reason = sequence.finish_reason
        num_tokens = len(sequence.completion_ids)
        speed = num_tokens / (time.perf_counter() - start)
        show_speed = sys.stdout.isatty() if args.show_speed is None else args.show_speed
        print(f"\n[{num_tokens} tokens, {speed:.1f} tokens/s]" if show_speed else "")
        while self.notices:
            notice(self.notices.pop(0))
        if not self.continues_text:
            self.messages.append(parser.message.to_dict())
        return parser.message


def main() -> None:
    args = parse_arguments()
    chat = Chat(*load_from_args(args, args.weight), args)
    if not args.prompt and not args.questions:
        return interact(chat)
    prompts = args.prompt or (TEXTS if chat.continues_text else QUESTIONS)
    if not all(map(str.strip, prompts)):
        raise UserError("--prompt is empty")
    for text in prompts:
        if len(prompts) > 1:
            print(f"\n> {text}")
        chat.messages.clear()
        chat.answer(text)


if __name__ == "__main__":
    run_main(main)
