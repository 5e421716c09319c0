"""The chat format: messages to token ids with a loss mask, and ids back to content, reasoning and tool calls.

A turn is `<|im_start|>role\n…<|im_end|>\n`. An assistant's turn begins with its reasoning between `<think>\n` and
`\n</think>\n\n` and may end in `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`; a tool's result is a user
turn holding `<tool_response>\n…\n</tool_response>`. The rendering of n + 1 messages begins with that of the first n.

Text and special tokens are never joined into one string: messages are rendered as segments of either kind, and text is
tokenised by an encoder without special tokens, so no text, whatever it contains, can forge one.
`chat_template.jinja` is the same format for other programs.
"""

import codecs
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

try:
    import tiktoken
except ImportError:  # optional: faster
    tiktoken = None

from model.cli import UserError, first_line

TOKENIZER_DIR = Path(__file__).resolve().parent
PAD, BOS, EOS = 0, 1, 2  # <|endoftext|> <|im_start|> <|im_end|>
SPECIAL_TOKENS = {"<tool_call>": 21, "</tool_call>": 22, "<tool_response>": 23, "</tool_response>": 24, "<think>": 25,
                  "</think>": 26}
CALL, END_CALL, RESPONSE, END_RESPONSE, THINK, END_THINK = SPECIAL_TOKENS.values()
ROLES = ("system", "user", "assistant", "tool")

Segment = tuple[str | int, bool]  # text or the id of a special token, and whether it is a target of the loss
MAX_TIKTOKEN_CHARS = 900_000  # tiktoken panics on a million consecutive spaces


def unicode_to_byte() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (Radford et al. 2019); this undoes it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass
class AssistantMessage:
    """The parts of what an assistant wrote."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict] = field(default_factory=list)  # [{"name": str, "arguments": dict}]
    malformed: list[str] = field(default_factory=list)  # texts of tool calls that cannot be read

    def to_dict(self) -> dict:
        """The message to append to the conversation."""
        message = {"role": "assistant", "content": self.content}
        if self.reasoning or "</think>" in self.content:  # beside this field, no reasoning is looked for in the content
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


def hash_tokenizer(text: str) -> str:
    """Hash of the vocabulary, merges and special tokens, by which the metadata of weights names their tokenizer.

    Not of the text of tokenizer.json: transformers serialises the same tokenizer differently.
    """
    layout = json.loads(text)
    added = {token["content"]: token["id"] for token in layout["added_tokens"]}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in layout["model"]["merges"]]
    content = json.dumps([sorted((layout["model"]["vocab"] | added).items()), merges, sorted(added.items())])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def tokenizer_hashes(text: str) -> tuple[str, str]:
    """The hash of a tokenizer.json, and the one that older .json files of weights have: of its text."""
    return hash_tokenizer(text), hashlib.sha256(text.encode()).hexdigest()[:16]


class ChatTokenizer:
    """The tokenizer of `folder` (tokenizer.json) and the chat format on top of it."""

    own_template = False  # whether the folder's own chat template writes the prompts
    required_tokens = {"<|endoftext|>": PAD, "<|im_start|>": BOS, "<|im_end|>": EOS, **SPECIAL_TOKENS}

    def __init__(self, folder: str | Path = TOKENIZER_DIR):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no tokenizer there; --tokenizer names a folder that holds tokenizer.json")
        text = path.read_text("utf-8")
        self.folder = Path(folder)
        try:
            self.hashes = tokenizer_hashes(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a tokenizer of byte-level BPE ({first_line(error)})") from None
        self.hash, settings = self.hashes[0], json.loads(text)
        added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        for token, expected in self.required_tokens.items():
            if added.get(token) != expected:
                raise UserError(f"{path}: token {token} must have id {expected}, found {added.get(token)}")
        self._bpe = Tokenizer.from_str(json.dumps(settings | {"added_tokens": []}))
        self.vocab_size = self._bpe.get_vocab_size()
        tokens = {i: token for vocabulary in (self._bpe.get_vocab(), added) for token, i in vocabulary.items()}
        byte_of = unicode_to_byte()
        #: by id: the bytes that a token adds to a UTF-8 text
        self.token_bytes = [tokens[i].encode() if tokens[i] in added else bytes(byte_of[c] for c in tokens[i])
                            for i in range(self.vocab_size)]
        self.num_special = next(i for i in range(self.vocab_size) if tokens[i] not in added)  # they come first
        self.has_special_tokens = SPECIAL_TOKENS.items() <= added.items()  # else <think> and <tool_call> are text
        self._tiktoken = self._fast_encoder(settings, added)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text; special tokens that are spelt in it stay text."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """`encode_text` of many texts at once. Other Python threads run meanwhile."""
        if self._tiktoken and max(map(len, texts), default=0) < MAX_TIKTOKEN_CHARS:
            return [self._tiktoken.encode_ordinary(text) for text in texts]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def _fast_encoder(self, settings: dict, added: dict[str, int]) -> "tiktoken.Encoding | None":
        """The same BPE in tiktoken, which is about four times as fast; None where it is absent or not the same.

        tiktoken merges any two neighbours whose bytes make a token, in the order of ids. That gives the ids of the
        tokenizers library if 1. ids follow the order of the merges, and 2. the merges make each token of its own bytes:
        then no two other neighbours can be left to make it. The split into words has to be one regular expression.
        """
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        match settings:
            case {"normalizer": None, "pre_tokenizer": {"pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, last]},
                  "model": {"type": "BPE", "dropout": None, "ignore_merges": False, "merges": merges, "vocab": vocab}}:
                pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
            case _:
                return None
        merged = [vocab["".join(pair)] for pair in pairs]
        ids = sorted(set(range(self.vocab_size)) - set(added.values()))
        if tiktoken is None or last != byte_level or merged != ids[256:]:
            return None
        bpe = Tokenizer.from_str(json.dumps(settings | {"added_tokens": [], "pre_tokenizer": None}))
        tokens = [bpe.id_to_token(i) for i in ids]
        if [encoding.ids for encoding in bpe.encode_batch_fast(tokens)] != [[i] for i in ids]:
            return None
        return tiktoken.Encoding(self.hash, pat_str=pattern, special_tokens={},
                                 mergeable_ranks={self.token_bytes[i]: i for i in ids})

    def decode(self, ids: Iterable[int], keep_special_tokens: bool = False) -> str:
        """Text of the ids; special tokens are left out unless `keep_special_tokens`."""
        parts = (self.token_bytes[i] for i in ids if keep_special_tokens or i >= self.num_special)
        return b"".join(parts).decode("utf-8", errors="replace")

    def encode_segments(self, conversations: list[list[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Ids and loss mask of rendered conversations, tokenised in one batch."""
        texts = [segment for segments in conversations for segment, _ in segments if isinstance(segment, str)]
        encoded = iter(self.encode_texts(texts))
        rows = []
        for segments in conversations:
            ids, mask = [], []
            for segment, is_target in segments:
                segment_ids = next(encoded) if isinstance(segment, str) else [segment]
                ids += segment_ids
                mask += [is_target] * len(segment_ids)
            rows.append((ids, mask))
        return rows

    def encode(self, messages: list[dict], tools: list | str | None = None,
               keep_empty_think: bool = True) -> tuple[list[int], list[bool]]:
        """Messages → ids and loss mask: True on what assistants wrote, with their `<|im_end|>`, and nowhere else."""
        return self.encode_segments([render(messages, tools, keep_empty_think)])[0]

    def prompt(self, messages: list[dict], tools: list | str | None = None, open_thinking: bool = False,
               continue_final_message: bool = False) -> list[int]:
        """Messages → ids that the next answer continues: inside `<think>\n`, or after an empty think block.

        With `continue_final_message`, the end of the last message, which must be an assistant's text.
        """
        segments = render(messages, tools)
        if continue_final_message:
            check_continuable(messages[-1])
            segments = segments[:-2]  # without <|im_end|> and the newline
        else:
            segments += generation_prompt(open_thinking)
        return self.encode_segments([segments])[0][0]

    def observation(self, messages: list[dict], open_thinking: bool = False) -> list[int]:
        """Ids between an assistant's `<|im_end|>` and its next turn: the results of tools, as the prompt has them."""
        segments = [("\n", False), *render(messages), *generation_prompt(open_thinking)]
        return self.encode_segments([segments])[0][0]

    def starts_in_thinking(self, open_thinking: bool) -> bool:
        """Whether what follows a prompt is thinking; there are templates that leave `<think>` to the model."""
        return open_thinking


def check_continuable(message: dict) -> None:
    """Raises ValueError unless the message is an assistant's text."""
    if message["role"] != "assistant" or message.get("tool_calls"):
        raise ValueError("continue_final_message continues an assistant's text; the last message is "
                         f"{'a tool call' if message['role'] == 'assistant' else 'of role ' + message['role']}")


def generation_prompt(open_thinking: bool) -> list[Segment]:
    """The segments between a conversation and the assistant's next tokens."""
    think = [(THINK, False), ("\n", False)] if open_thinking else empty_think_block()
    return [(BOS, False), ("assistant\n", False), *think]


def empty_think_block() -> list[Segment]:
    return [(THINK, False), ("\n\n", False), (END_THINK, False), ("\n\n", False)]


def render(messages: list[dict], tools: list | str | None = None, keep_empty_think: bool = True) -> list[Segment]:
    """Messages → segments. Without `keep_empty_think`, an assistant's turn without reasoning has no think block.

    `tools` may also be a field of the first message. Nothing of a message with `"train": False` is a target. Raises
    ValueError with the number of the message and the reason.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a non-empty list of messages")
    segments: list[Segment] = []
    for number, message in enumerate(messages, 1):
        try:
            if not isinstance(message, dict):
                raise ValueError(f"a message must be an object, not {type(message).__name__}")
            if number == 1:
                tools = parse_json(tools or message.get("tools") or [], "tools", list)
                if tools and message.get("role") != "system":
                    segments += turn("system", system_segments("", tools))
            written = turn(*message_segments(message, tools if number == 1 else [], keep_empty_think))
            segments += written if message.get("train", True) else [(segment, False) for segment, _ in written]
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return segments


def turn(role: str, segments: list[Segment]) -> list[Segment]:
    for segment, _ in segments:
        if isinstance(segment, str):
            check_text(segment)
    return [(BOS, False), *segments, (EOS, role == "assistant"), ("\n", False)]


def message_segments(message: dict, tools: list, keep_empty_think: bool) -> tuple[str, list[Segment]]:
    """One message → its role and the segments between `<|im_start|>` and `<|im_end|>`."""
    role, content = message.get("role"), content_text(message.get("content"))
    if role == "system":
        return role, system_segments(content, tools)
    if role == "user":
        return role, [(f"user\n{content}", False)]
    if role == "tool":
        return role, [("user\n", False), (RESPONSE, False), (f"\n{content}\n", False), (END_RESPONSE, False)]
    if role == "assistant":
        return role, [("assistant\n", False), *assistant_segments(message, content, keep_empty_think)]
    raise ValueError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")


def system_segments(content: str, tools: list) -> list[Segment]:
    if not tools:
        return [(f"system\n{content}", False)]
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    start = f"system\n{content}\n\n# Tools\n" if content else "system\n# Tools\n"
    return [(f"{start}{schemas}\nTo call a tool, write ", False), (CALL, False),
            ('\n{"name": its name, "arguments": {its arguments}}\n', False), (END_CALL, False)]


def assistant_segments(message: dict, content: str, keep_empty_think: bool) -> list[Segment]:
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"reasoning_content must be text, not {type(reasoning).__name__}")
    if reasoning is None and "</think>" in content:  # older data sets keep the reasoning in the content
        before, content = content.split("</think>", 1)
        reasoning = before.split("<think>", 1)[-1]
    reasoning, content = (reasoning or "").strip("\n"), content.lstrip("\n")
    segments: list[Segment] = []
    if reasoning:
        segments = [(THINK, True), ("\n", True), (f"{reasoning}\n", True), (END_THINK, True), ("\n\n", True)]
    elif keep_empty_think:
        segments = empty_think_block()
    calls = parse_tool_calls(message)
    if content:
        segments.append((content + "\n" * bool(calls), True))
    for number, call in enumerate(calls):
        if number:
            segments.append(("\n", True))
        segments += [(CALL, True), (f"\n{json.dumps(call, ensure_ascii=False)}\n", True), (END_CALL, True)]
    return segments


def content_text(content: str | list | None) -> str:
    """The text of a message's content: text, OpenAI's list of text parts, or None."""
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError('a part of the content must be {"type": "text", "text": text}')
        return "".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"content must be text, not {type(content).__name__}")
    return content


def parse_tool_calls(message: dict) -> list[dict]:
    """Tool calls as [{"name", "arguments": dict}], from a list or JSON text, flat or as OpenAI nests them."""
    calls = []
    for call in parse_json(message.get("tool_calls") or [], "tool_calls", list):
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError('a tool call must be {"name": text, "arguments": object}')
        calls.append({"name": call["name"], "arguments": parse_json(call.get("arguments") or {}, "arguments", dict)})
    return calls


def parse_json(value: object, name: str, kind: type) -> list | dict:
    """`value` itself, or parsed when it is JSON text. Raises ValueError when it is not of `kind`."""
    try:
        value = read_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {kind.__name__}, not {type(value).__name__}")
    return value


def refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def finite_float(text: str) -> float:
    return number if math.isfinite(number := float(text)) else refuse_number(text)


DECODER = json.JSONDecoder(parse_constant=refuse_number, parse_float=finite_float)  # Python's own reads NaN and 1e999


def read_json(text: str) -> object:
    """JSON text → value. Raises ValueError when it is not JSON, or when a string in it is not Unicode text."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if "\\ud" in text.lower():
        check_text(json.dumps(value, ensure_ascii=False))
    return value


def check_text(text: str) -> None:
    """Raises ValueError for half a surrogate pair, which Python and JSON allow but no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not text: half a surrogate pair (\\ud800 to \\udfff) in it") from None


class MessageParser:
    """Parses an assistant's answer while it is written: feed ids or text, get events; `message` is the answer so far.

    An event is ("content" | "reasoning", text), ("tool_call", {"name", "arguments"}) or ("malformed", text).
    Incomplete characters and special tokens are held back. Newlines at the ends of the reasoning, the content and the
    calls belong to the format and are left out. `continued` is the content that the prompt already holds, if any.

    1. `feed` and `feed_text` split their input into text and special tokens.
    2. `_special_token` changes the `section`: reasoning, content or tool_call. A call is parsed when its section ends.
    3. `_text` adds to the section; newlines wait until something follows them.
    """

    def __init__(self, tokenizer: ChatTokenizer, open_thinking: bool = False, continued: str | None = None):
        self.tokenizer = tokenizer
        self.message = AssistantMessage(continued or "")
        starts_in_thinking = tokenizer.starts_in_thinking(open_thinking) if tokenizer else open_thinking
        starts_in_thinking &= continued is None
        self.section = "reasoning" if starts_in_thinking else "content"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending_text = ""  # from feed_text: may be the beginning of a special token
        self._pending_newlines = ""  # of the text if more of it follows, else of the format
        self._call = ""  # text of the tool call being written

    def feed(self, tokens: Iterable[int | str]) -> Iterator[tuple[str, str | dict]]:
        """Events of the next token ids, or of text in which no special token is meant. Other specials are skipped.

        Where the tokenizer has no tokens for thinking and tool calls, all text is searched for their spelling.
        """
        text = self._text if self.tokenizer.has_special_tokens else self.feed_text
        for token in tokens:
            if isinstance(token, str):
                yield from text(token)
            elif token >= self.tokenizer.num_special:
                yield from text(self._utf8.decode(self.tokenizer.token_bytes[token]))
            elif token in SPECIAL_TOKENS.values():
                yield from self._text(self._utf8.decode(b"", final=True))
                yield from self._special_token(token)

    def feed_text(self, text: str) -> Iterator[tuple[str, str | dict]]:
        """Events of the next piece of text in which special tokens are spelt out, as other servers send it."""
        *parts, tail = re.split(f"({'|'.join(SPECIAL_TOKENS)})", self._pending_text + text)
        for part in parts:
            yield from self._special_token(SPECIAL_TOKENS[part]) if part in SPECIAL_TOKENS else self._text(part)
        held_back = [tail[-n:] for token in SPECIAL_TOKENS for n in range(1, len(token)) if tail.endswith(token[:n])]
        self._pending_text = max(held_back, key=len, default="")
        yield from self._text(tail[:len(tail) - len(self._pending_text)])

    def finish(self) -> Iterator[tuple[str, str | dict]]:
        """Events of what was held back. A call that was never closed is malformed."""
        yield from self._text(self._utf8.decode(b"", final=True) + self._pending_text)
        self._pending_text = ""
        if self.section == "tool_call":
            yield from self._malformed()

    def _text(self, text: str) -> Iterator[tuple[str, str]]:
        if self.section == "tool_call":
            self._call += text
            return
        so_far = getattr(self.message, self.section)
        text = self._pending_newlines + text
        text = text if so_far else text.lstrip("\n")
        stripped = text.rstrip("\n")
        self._pending_newlines = text[len(stripped):]
        if stripped:
            setattr(self.message, self.section, so_far + stripped)
            yield self.section, stripped

    def _special_token(self, token: int) -> Iterator[tuple[str, str | dict]]:
        if token in (RESPONSE, END_RESPONSE):  # an assistant has no use for them
            return
        if self.section == "tool_call":
            try:
                if token != END_CALL:
                    raise ValueError("the call is not closed")
                call, = parse_tool_calls({"tool_calls": [parse_json(self._call, "tool call", dict)]})
                self.message.tool_calls.append(call)
                yield "tool_call", call
            except ValueError:
                yield from self._malformed()
        self._pending_newlines, self._call = "", ""
        self.section = {THINK: "reasoning", CALL: "tool_call"}.get(token, "content")

    def _malformed(self) -> Iterator[tuple[str, str]]:
        self.message.malformed.append(self._call.strip("\n"))
        yield "malformed", self._call.strip("\n")


def parse_message(tokenizer: ChatTokenizer, answer: Iterable[int] | str,
                  open_thinking: bool = False) -> AssistantMessage:
    """The parts of a complete answer, given as ids or text. `open_thinking`: its prompt ended inside `<think>`."""
    parser = MessageParser(tokenizer, open_thinking)
    list(parser.feed_text(answer) if isinstance(answer, str) else parser.feed(answer))
    list(parser.finish())
    return parser.message
