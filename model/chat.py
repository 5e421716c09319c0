"""THE chat format: messages to tokens with a loss mask, and tokens back to content, reasoning and tool calls.

A turn is `<|im_start|>role\n…<|im_end|>\n`. What an assistant says starts with its thinking between `<think>\n` and
`\n</think>\n\n` and may end in `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`; a tool's result is a user
turn holding `<tool_response>\n…\n</tool_response>`. Rendering n + 1 messages begins with the rendering of n.

Text and markers never meet in one string: the renderer yields them apart, text is tokenised by an encoder that knows
no markers, and so no text, whatever it contains, becomes a special token. `chat_template.jinja` says the same to other
programs.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from model.cli import UserError

TOKENIZER_DIR = Path(__file__).resolve().parent
PAD, BOS, EOS = 0, 1, 2  # <|endoftext|> <|im_start|> <|im_end|>
SPECIAL_TOKENS = {"<tool_call>": 21, "</tool_call>": 22, "<tool_response>": 23, "</tool_response>": 24,
           "<think>": 25, "</think>": 26}
CALL, END_CALL, RESPONSE, END_RESPONSE, THINK, END_THINK = SPECIAL_TOKENS.values()
ROLES = ("system", "user", "assistant", "tool")

Segment = tuple[str | int, bool]  # text or marker id, and whether the assistant said it


def unicode_to_byte() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (Radford et al. 2019); this undoes it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@dataclass
class AssistantMessage:
    """What an assistant said, taken apart. `malformed` holds the text of tool calls that could not be read."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict] = field(default_factory=list)  # [{"name": str, "arguments": dict}]
    malformed: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """As a message of the chat format, to append to the conversation."""
        message = {"role": "assistant", "content": self.content}
        if self.reasoning or "</think>" in self.content:  # with the field, the content is all content
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


def hash_tokenizer(text: str) -> str:
    """By which the .json of a weight names its tokenizer: a hash of the text of tokenizer.json."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ChatTokenizer:
    """The tokenizer of `folder` (tokenizer.json) and the chat format on top of it."""

    def __init__(self, folder: str | Path = TOKENIZER_DIR):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no tokenizer there; --tokenizer names a folder that holds tokenizer.json")
        text = path.read_text("utf-8")
        self.folder = Path(folder)
        self.hash = hash_tokenizer(text)
        layout = json.loads(text)
        added = {token["content"]: token["id"] for token in layout["added_tokens"]}
        for token, expected in {"<|endoftext|>": PAD, "<|im_start|>": BOS, "<|im_end|>": EOS, **SPECIAL_TOKENS}.items():
            if added.get(token) != expected:
                raise UserError(f"{path}: token {token} must have id {expected}, found {added.get(token)}")
        self._plain = Tokenizer.from_str(json.dumps(layout | {"added_tokens": []}))
        self.vocab_size = self._plain.get_vocab_size()
        names = {number: token for token, number in self._plain.get_vocab().items()} | {i: t for t, i in added.items()}
        alphabet = unicode_to_byte()
        #: the bytes each token stands for, by id: what it adds to a UTF-8 text
        self.token_bytes = [names[i].encode() if names[i] in added else bytes(alphabet[c] for c in names[i])
                            for i in range(self.vocab_size)]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text. Markers in it stay text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts at once, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], keep_special_tokens: bool = False) -> str:
        """Text of the ids; special tokens (below 36) are left out unless `keep_special_tokens`."""
        kept = (self.token_bytes[i] for i in ids if keep_special_tokens or i > 35)
        return b"".join(kept).decode("utf-8", errors="replace")

    def encode_segments(self, conversations: list[list[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Ids and loss mask of rendered conversations, tokenised in one batch."""
        texts = [segment for segments in conversations for segment, _ in segments if isinstance(segment, str)]
        encoded = iter(self.encode_texts(texts))
        rows = []
        for segments in conversations:
            ids, mask = [], []
            for segment, said in segments:
                tokens = next(encoded) if isinstance(segment, str) else [segment]
                ids += tokens
                mask += [said] * len(tokens)
            rows.append((ids, mask))
        return rows

    def encode(self, messages: list[dict], tools: list | str | None = None,
               keep_empty_think: bool = True) -> tuple[list[int], list[bool]]:
        """Messages → ids and loss mask: True on what an assistant said and on its `<|im_end|>`, nowhere else."""
        return self.encode_segments([render(messages, tools, keep_empty_think)])[0]

    def prompt(self, messages: list[dict], tools: list | str | None = None, open_thinking: bool = False) -> list[int]:
        """Messages → ids that an assistant's answer follows: inside `<think>\n`, or after an empty think block."""
        segments = [*render(messages, tools), *generation_prompt(open_thinking)]
        return self.encode_segments([segments])[0][0]


def generation_prompt(open_thinking: bool) -> list[Segment]:
    """The segments that stand between a conversation and the assistant's next words."""
    thinking = [(THINK, False), ("\n", False)] if open_thinking else empty_think_block()
    return [(BOS, False), ("assistant\n", False), *thinking]


def empty_think_block() -> list[Segment]:
    return [(THINK, False), ("\n\n", False), (END_THINK, False), ("\n\n", False)]


def render(messages: list[dict], tools: list | str | None = None, keep_empty_think: bool = True) -> list[Segment]:
    """Messages → segments. Without `keep_empty_think`, an assistant turn without reasoning has no think block at all.

    `tools` may also sit on the first message. Raises ValueError saying what is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation is a non-empty list of messages")
    segments: list[Segment] = []
    for number, message in enumerate(messages, 1):
        try:
            if not isinstance(message, dict):
                raise ValueError(f"a message is an object, not {type(message).__name__}")
            if number == 1:
                tools = parse_json(tools or message.get("tools") or [], "tools", list)
                if tools and message.get("role") != "system":
                    segments += turn("system", system_segments("", tools))
            segments += turn(*message_segments(message, tools if number == 1 else [], keep_empty_think))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return segments


def turn(role: str, segments: list[Segment]) -> list[Segment]:
    said = role == "assistant"
    for segment, _ in segments:
        if isinstance(segment, str):
            check_text(segment)
    return [(BOS, False), *segments, (EOS, said), ("\n", False)]


def message_segments(message: dict, tools: list, keep_empty_think: bool) -> tuple[str, list[Segment]]:
    """One message → its role and what stands between `<|im_start|>` and `<|im_end|>`."""
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
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    start = f"system\n{content}\n\n# Tools\n" if content else "system\n# Tools\n"
    return [(f"{start}{listed}\nTo call a tool, write ", False), (CALL, False),
            ('\n{"name": its name, "arguments": {its arguments}}\n', False), (END_CALL, False)]


def assistant_segments(message: dict, content: str, keep_empty_think: bool) -> list[Segment]:
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"reasoning_content is text, not {type(reasoning).__name__}")
    if reasoning is None and "</think>" in content:  # older files keep the thinking inside the content
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
    """The content of a message: text, OpenAI's text parts, or nothing."""
    if content is None:
        return ""
    if isinstance(content, list):
        content = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in content):
            raise ValueError('a part of the content is {"type": "text", "text": text}')
        return "".join(content)
    if not isinstance(content, str):
        raise ValueError(f"content is text, not {type(content).__name__}")
    return content


def parse_tool_calls(message: dict) -> list[dict]:
    """Tool calls as [{"name", "arguments": dict}], from a list or JSON text, flat or as OpenAI nests them."""
    calls = []
    for call in parse_json(message.get("tool_calls") or [], "tool_calls", list):
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError('a tool call is {"name": text, "arguments": object}')
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


def read_json(text: str) -> object:
    """JSON text → value. Raises ValueError when it is none, or when a string in it is no text."""
    try:
        value = json.loads(text)
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
    """Takes an answer apart while it is written: feed ids or text, get events, read `answer` at any time.

    An event is ("content" | "reasoning", text), ("tool_call", {"name", "arguments"}) or ("malformed", text).
    Half a character and half a marker are held back until they are whole. Newlines around the thinking, the
    content and the calls belong to the format and are left out.
    """

    def __init__(self, tokenizer: ChatTokenizer, open_thinking: bool = False):
        self.tokenizer = tokenizer
        self.message = AssistantMessage()
        self._section = "reasoning" if open_thinking else "content"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""  # fed as text, may end in half a marker
        self._newlines = ""  # may be the format's or the text's: known when something follows
        self._call = ""

    def feed(self, segments: Iterable[int | str]) -> Iterator[tuple[str, str | dict]]:
        """Events of the next token ids, or of text in which no marker is meant. Other special tokens say nothing."""
        for i in segments:
            if isinstance(i, str):
                yield from self._say(i)
            elif i > 35:
                yield from self._say(self._utf8.decode(self.tokenizer.token_bytes[i]))
            elif i in SPECIAL_TOKENS.values():
                yield from self._say(self._utf8.decode(b"", final=True))
                yield from self._switch(i)

    def feed_text(self, text: str) -> Iterator[tuple[str, str | dict]]:
        """Events of the next segment of text, for answers that come from elsewhere as text."""
        self._text += text
        while found := min(((self._text.find(m), m) for m in SPECIAL_TOKENS if m in self._text), default=None):
            start, marker = found
            before, self._text = self._text[:start], self._text[start + len(marker):]
            yield from self._say(before)
            yield from self._switch(SPECIAL_TOKENS[marker])
        held = max((n for m in SPECIAL_TOKENS for n in range(1, len(m)) if self._text.endswith(m[:n])), default=0)
        ready, self._text = self._text[:len(self._text) - held], self._text[len(self._text) - held:]
        yield from self._say(ready)

    def finish(self) -> Iterator[tuple[str, str | dict]]:
        """Events of what was held back. A call that was never closed is malformed."""
        yield from self._say(self._utf8.decode(b"", final=True) + self._text)
        self._text = ""
        if self._section == "tool_call":
            yield from self._malformed()

    def _say(self, text: str) -> Iterator[tuple[str, str]]:
        if self._section == "tool_call":
            self._call += text
            return
        name = self._section
        so_far = getattr(self.message, name)
        text = self._newlines + text
        text = text if so_far else text.lstrip("\n")
        said = text.rstrip("\n")
        self._newlines = text[len(said):]
        if said:
            setattr(self.message, name, so_far + said)
            yield name, said

    def _switch(self, marker: int) -> Iterator[tuple[str, str | dict]]:
        if marker in (RESPONSE, END_RESPONSE):  # not the assistant's to say
            return
        if self._section == "tool_call":
            if marker != END_CALL:
                yield from self._malformed()
            else:
                try:
                    call, = parse_tool_calls({"tool_calls": [parse_json(self._call, "tool call", dict)]})
                    self.message.tool_calls.append(call)
                    yield "tool_call", call
                except ValueError:
                    yield from self._malformed()
        self._newlines, self._call = "", ""
        self._section = {THINK: "reasoning", CALL: "tool_call"}.get(marker, "content")

    def _malformed(self) -> Iterator[tuple[str, str]]:
        self.message.malformed.append(self._call.strip("\n"))
        yield "malformed", self._call.strip("\n")


def parse_message(tokenizer: ChatTokenizer, answer: Iterable[int] | str,
                  open_thinking: bool = False) -> AssistantMessage:
    """A whole answer, as ids or text, taken apart."""
    parser = MessageParser(tokenizer, open_thinking)
    list(parser.feed_text(answer) if isinstance(answer, str) else parser.feed(answer))
    list(parser.finish())
    return parser.message
