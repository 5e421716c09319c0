"""Structured outputs: the grammar of a completion, and by it the tokens that may come next.

Grammars are written in the Lark syntax of llguidance (https://github.com/guidance-ai/llguidance, docs/syntax.md), which
computes the masks: `%json` is a JSON schema, `<[26]>` the token 26. JSON is written as `json.dumps` writes it, as in
the rows that models learn from; whitespace that a schema leaves free could go on for ever.
"""

import json
import re
from collections.abc import Sequence
from copy import copy
from functools import cache, lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from model.chat import BOS, EOS, SPECIAL_TOKENS, ChatTokenizer, parse_json

JSON_STYLE = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
ANY_OBJECT, NO_ARGUMENTS = {"type": "object"}, {"type": "object", "properties": {}}


def library() -> ModuleType:
    """llguidance, which only structured outputs need."""
    try:
        import llguidance
    except ImportError:
        raise ValueError("structured outputs need a library: pip install llguidance") from None
    return llguidance


class Grammar:
    """A grammar compiled for a tokenizer, and the state of one completion in it.

    Raises ValueError, one line, for a bad schema or regular expression, and where llguidance is not installed.
    """

    def __init__(self, tokenizer: ChatTokenizer, rules: str):
        self.vocab_size = tokenizer.vocab_size
        self.matcher = library().LLMatcher(guidance_tokenizer(tokenizer), rules, log_level=0)
        if error := self.matcher.get_error():
            lines = [line.strip() for line in error.splitlines() if not re.match(r"\s*(\d+ \||\^)", line)]
            raise ValueError(re.sub(r"^at \d+\(\d+\): ", "", " ".join(lines)))

    def copy(self) -> "Grammar":
        """The same grammar and the same state, for a completion of its own."""
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    def accept(self, token: int) -> bool:
        """Advance by one token; False where it is not allowed, or where llguidance has reached one of its limits."""
        return self.matcher.consume_token(token) and not self.matcher.is_error()


@lru_cache(maxsize=4)
def guidance_tokenizer(tokenizer: ChatTokenizer) -> object:
    """A tokenizer as llguidance takes it: the bytes of each token, and which are special."""

    class Wrapped:
        eos_token_id, bos_token_id = EOS, BOS
        tokens, special_token_ids = tokenizer.token_bytes, list(range(tokenizer.num_special))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode_text(text)

    return library().LLTokenizer(library().TokenizerWrapper(Wrapped()))


@cache
def mask_executor() -> object:
    """Computes the masks of a batch in parallel."""
    return library().LLExecutor()


def json_rule(schema: dict) -> str:
    """The rule for a JSON value that matches `schema`."""
    return f"%json {json.dumps(schema | JSON_STYLE)}"


def regex_rule(regex: str) -> str:
    """The rule for a text that `regex` matches as a whole."""
    return f"/{library().regex_to_lark(regex, use_ascii='')}/"


def text_grammar(tokenizer: ChatTokenizer, rule: str) -> Grammar:
    """The grammar of a completion that consists of `rule` alone."""
    return Grammar(tokenizer, f"start: {rule}")


def chat_grammar(tokenizer: ChatTokenizer, open_thinking: bool = False, answer: str | None = None,
                 tools: Sequence[dict] = (), call_required: bool = False, parallel_calls: bool = True) -> Grammar:
    """Of an assistant's turn: thinking, which is free, then the rule `answer` (None: free text), or calls of `tools`.

    A call has the name and the arguments of one of the tools; without `parallel_calls` there is at most one. Free text
    may stand before calls. With `call_required` there is nothing but calls.
    """
    names = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    is_special = tokenizer.has_special_tokens
    call, end_call, think, end_think = (f"<[{SPECIAL_TOKENS[name]}]>" if is_special else json.dumps(name)
                                        for name in names)
    if is_special:  # no text contains them
        rules = ["TEXT: /(.|\\n)+/", f"text_and_call: TEXT? {call}", f"thought: TEXT? {end_think}"]
    else:
        rules = ["TEXT: /(.|\\n)*/ & ~/(.|\\n)*<\\/?(tool_call|think)>(.|\\n)*/",
                 f"text_and_call[suffix={call}]: TEXT", f"thought[suffix={end_think}]: TEXT"]
    answers = [] if answer is None or call_required else [answer]
    if tools:
        functions = " | ".join(function_rule(tool.get("function", tool)) for tool in tools)
        more = f' ("\\n" {call} arguments)*' if parallel_calls else ""
        rules += [f'calls: arguments{more}', f'arguments: "\\n" ({functions}) "\\n" {end_call}']
        answers.append(f"{call} calls")
    if answer is None and not call_required:
        answers += ["TEXT?"] + ["text_and_call calls"] * bool(tools)
    thinking = 'thought "\\n\\n"'
    if not tokenizer.starts_in_thinking(open_thinking):  # a template may leave it to the model to think
        thinking = f"({think} {thinking})?" if open_thinking else ""
    return Grammar(tokenizer, "\n".join([f"start: {thinking} ({' | '.join(answers)})", *rules]))


def function_rule(function: dict) -> str:
    """The rule for the JSON of a call, as the chat format writes it."""
    parameters = ANY_OBJECT | parse_json(function.get("parameters") or NO_ARGUMENTS, "parameters", dict)
    if "properties" in parameters:  # a call has no arguments of its own invention, unless the tool says so
        parameters = {"additionalProperties": False} | parameters
    start = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
    return f'{json.dumps(start, ensure_ascii=False)} {json_rule(parameters)} "}}"'


def allowed_tokens(grammars: list[Grammar | None], vocab_size: int, pin_memory: bool = False) -> Tensor | None:
    """Which tokens each completion may go on with: [B, V] bool, all of them where it has no grammar. None: no mask.

    Always in the CPU's memory: a GPU may still be computing the logits. `pin_memory`: as a copy to it should be.
    """
    rows = [(grammar.matcher, row) for row, grammar in enumerate(grammars) if grammar is not None]
    if not rows:
        return None
    from llguidance.numpy import fill_next_token_bitmask_par

    num_tokens = grammars[rows[0][1]].vocab_size  # the model may embed more, which no text has
    words = np.full((len(grammars), -(-num_tokens // 32)), -1, np.int32)
    fill_next_token_bitmask_par(mask_executor(), rows, words)
    allowed = torch.ones(len(grammars), vocab_size, dtype=torch.bool, pin_memory=pin_memory)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=num_tokens, bitorder="little")
    allowed[:, :num_tokens] = torch.from_numpy(bits).bool()
    allowed[[row for _, row in rows], num_tokens:] = False
    return allowed
