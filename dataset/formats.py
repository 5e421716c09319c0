"""Row formats: an ordinary row → the canonical row that our data sets learn from, or what is wrong with it.

    a row has                       it is read as
    text                            {"text": text}                                                      kind "text"
    conversations, or messages      {"conversations": [messages]}, from a list or the JSON text of one  kind "chat"
    prompt, completion              the same, from texts or messages; only the completion is learned
    instruction, output             the same (alpaca): instruction and `input`, joined by a newline, after the turns of
                                    `history`, [[question, answer]]
    query, answers                  the same (xLAM): a question and the tool calls that answer it
    chosen, rejected                {"chosen": [messages], "rejected": [messages]}; the prompt may stand  kind "pair"
                                    apart, as prompt, conversations, messages or instruction
    one of kind "chat", or prompt   {"conversations": [messages]} without the last answer,              kind "prompt"
    or instruction alone            which is a placeholder

    in a row or message             it means
    from, value                     role and content (ShareGPT); thinking and reasoning: reasoning_content
    human, gpt, observation, …      roles, see ROLES
    function_call, as role or key   the tool calls of the answer
    content [{"type": "text", …}]   the texts joined; parts of another kind are refused
    <think>…</think> in an answer   its reasoning_content; text before it, a second block or an open one are refused
    <tool_call>…</tool_call> in it  its tool_calls; text after them, open and unreadable ones are refused
    <tool_response>…                a message of these alone: one tool message each
    system, tools of the row        the system message's; tools of later messages too; two lists of tools are refused
    weight, train, loss             of an answer: 0 or false, it is read but not learned ("train": false)
    an answer without text, calls and reasoning; a question or result without content; two equal conversations as a
    pair; images, audio, video      refused
    any other key with a value      not used; returned, for a report to count
"""

import re
from collections.abc import Collection, Iterable

from model.chat import ROLES as OUR_ROLES
from model.chat import parse_json, parse_tool_calls, read_json

FORMATS = {  # name: kind, the fields it has, and may have
    "text": ("text", ("text",), ()),
    "preference pair": ("pair", ("chosen", "rejected"),
                        ("prompt", "conversations", "messages", "instruction", "input", "history")),
    "conversations": ("chat", ("conversations",), ()),
    "messages": ("chat", ("messages",), ()),
    "prompt and completion": ("chat", ("prompt", "completion"), ()),
    "alpaca": ("chat", ("instruction", "output"), ("input", "history")),
    "xLAM": ("chat", ("query", "answers"), ()),
    "prompt": ("prompt", ("prompt",), ()),
    "instruction": ("prompt", ("instruction",), ("input", "history")),
}  # fmt: skip
EXPECTED = {
    "text": 'a pretraining row is {"text": …}',
    "pair": 'a row is {"chosen": [messages], "rejected": [messages]}, or has prompt, chosen and rejected',
    "chat": 'a row is {"conversations": [messages]}, or has messages, prompt and completion, instruction and output, '
            "or query and answers",
    "prompt": 'a row is {"conversations": [messages]}, or has messages, prompt, or instruction',
}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "function_call": "assistant", "function": "tool",
         "observation": "tool", "developer": "system", **{role: role for role in OUR_ROLES}}
ALIASES = {"from": "role", "value": "content", "reasoning": "reasoning_content", "thinking": "reasoning_content"}
SWITCHES = ("weight", "train", "loss")
MESSAGE_KEYS = ("role", "content", "tools", *SWITCHES)
ANSWER_KEYS = (*MESSAGE_KEYS, "reasoning_content", "tool_calls", "function_call")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def recognise(row: dict, kind: str) -> str:
    """The name in FORMATS of the format in which a row is read as one of `kind`. Raises ValueError when it has none."""
    kinds = ("chat", "prompt") if kind == "prompt" else (kind,)
    for fields in ({name for name in row if row[name] is not None}, row.keys()):
        for name, (format_kind, needed, _) in FORMATS.items():
            if format_kind in kinds and fields >= set(needed):
                return name
    raise ValueError(f"{EXPECTED[kind]}; this one has {list_keys(row)}")


def normalise(row: dict, kind: str) -> tuple[dict, list[str]]:
    """A row → the canonical row of `kind` ("text", "chat", "pair", "prompt"), and which of its keys are not used.

    Raises ValueError saying what is wrong with it.
    """
    name = recognise(row, kind)
    _, needed, optional = FORMATS[name]
    if kind == "text":
        if not isinstance(row["text"], str):
            raise ValueError(f"{EXPECTED[kind]}, text, not {type(row['text']).__name__}")
        if not row["text"].strip():
            raise ValueError("the text is empty")
        return {"text": row["text"]}, unused_keys(row, needed)
    if media := [key for key in MEDIA if row.get(key)]:
        raise ValueError(f"this model reads text only; the row has {media[0]}")
    unused = unused_keys(row, (*needed, *optional, "system", "tools", "functions", *["gt"] * (kind == "prompt")))
    if kind == "pair":
        return normalise_pair(row, unused), list(dict.fromkeys(unused))
    messages = raw_messages(row, name)
    if kind == "prompt" and role_of(messages[-1]) == "assistant":
        messages = messages[:-1]
        if not messages:
            raise ValueError("no message before the answer")
    canonical = {"conversations": normalise_messages(messages, row, unused)}
    return canonical | ({"gt": row["gt"]} if kind == "prompt" and "gt" in row else {}), list(dict.fromkeys(unused))


def list_keys(values: Iterable[str]) -> str:
    return " ".join(", ".join(f"{key:.40}" for key in list(values)[:8]).split()) or "nothing"


def unused_keys(values: dict, used: Collection[str], prefix: str = "") -> list[str]:
    return [f"{prefix}{key}" for key in values if key not in used and values[key] not in (None, "", [], {})]


# -- formats -----------------------------------------------------------------------------------------------------------


def raw_messages(row: dict, name: str) -> list[dict]:
    """The messages of a row of format `name`, at least one, as they are written."""
    if name in ("conversations", "messages"):
        return message_list(row, name)
    if name == "xLAM":
        return [{"role": "user", "content": row["query"]}, {"role": "assistant", "tool_calls": row["answers"]}]
    if name in ("alpaca", "instruction"):
        question = [row.get(field) or "" for field in ("instruction", "input")]
        history = parse_json(row.get("history") or [], "history", list)
        if not all(isinstance(text, str) for text in question) or not all(
                isinstance(turn, list) and len(turn) == 2 for turn in history):
            raise ValueError("instruction and input must be texts, history must be [[question, answer], …]")
        turns = [*history, ["\n".join(filter(None, question)), row.get("output")]]
        messages = [{"role": role, "content": text} for turn in turns
                    for role, text in zip(("user", "assistant"), turn, strict=True)]
        return messages if name == "alpaca" else messages[:-1]
    prompt = [message | {"train": False} if role_of(message) == "assistant" else message
              for message in message_list(row, "prompt", "user")]
    return prompt + (message_list(row, "completion", "assistant") if name == "prompt and completion" else [])


def message_list(row: dict, field: str, role: str = "") -> list[dict]:
    """The messages in a field: a list, or JSON text of one. With `role`, it may be one message, or the text of one."""
    value = row[field]
    if role and isinstance(value, str):
        value = {"role": role, "content": value}
    messages = [value] if role and isinstance(value, dict) else parse_json(value, field, list)
    if not messages:
        raise ValueError(f"{field} is empty; a conversation has one message or more")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("a message must be an object with role and content")
    return messages


def normalise_pair(row: dict, unused: list[str]) -> dict:
    """The two sides of a preference pair, each as a whole conversation."""
    field = next((name for name in ("prompt", "conversations", "messages") if row.get(name)), None)
    prompt = (message_list(row, field, "user") if field else
              raw_messages(row, "instruction") if row.get("instruction") else [])
    sides = {}
    for side in ("chosen", "rejected"):
        try:
            messages = message_list(row, side, "assistant")
            if role_of(messages[0]) == "assistant":
                if not prompt:
                    raise ValueError("the prompt that it answers is missing")
                messages = prompt + messages
            elif prompt and normalise_messages(messages[:-1])[-len(prompt):] != normalise_messages(prompt):
                raise ValueError("it neither answers the prompt nor begins with it")
            sides[side] = normalise_messages(messages, row, unused)
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None
    if sides["chosen"] == sides["rejected"]:
        raise ValueError("chosen and rejected are equal, so neither is preferred")
    return sides


# -- messages ----------------------------------------------------------------------------------------------------------


def normalise_messages(raw: list[dict], row: dict | None = None, unused: list[str] | None = None) -> list[dict]:
    """Messages as they are written, and what their row adds, → messages of the chat format.

    `unused` gets the names of keys that are not used. Raises ValueError naming the message.
    """
    row, unused = row or {}, [] if unused is None else unused
    tools = {name: parse_json(row.get(name) or [], name, list) for name in ("tools", "functions")}
    messages, no_content = [], ""
    for number, message in enumerate(raw, 1):
        try:
            tools[f"message {number}"] = parse_json(message.get("tools") or [], "tools", list)
            messages += normalise_message(message, unused)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        if messages[-1].get("content") is None and messages[-1]["role"] in ("user", "tool"):
            no_content = no_content or f"message {number}: no content"
    if no_content:
        raise ValueError(no_content)
    return with_system(messages, row.get("system") or "", {name: value for name, value in tools.items() if value})


def with_system(messages: list[dict], prompt: str, tools: dict[str, list]) -> list[dict]:
    """Put the row's system prompt, and the tools, wherever they stand, on the system message that comes first."""
    offered = next(iter(tools.values()), [])
    for name, value in tools.items():
        if value != offered or not all(isinstance(tool, dict) and isinstance(tool.get("function", {}), dict)
                                       for tool in value):
            raise ValueError(f"{name}: " + ("a tool is an object" if value == offered else
                                            f"other tools than in {next(iter(tools))}; a conversation has one list"))
    has_system = bool(messages) and messages[0]["role"] == "system"
    if not isinstance(prompt, str) or prompt and has_system and messages[0].get("content") not in (None, "", prompt):
        raise ValueError("system: not text, or another system prompt than that of message 1")
    if not prompt and (not tools or list(tools) == ["message 1"] and has_system):
        return messages
    first = {"role": "system", "content": ""} | (messages[0] if has_system else {})
    first |= ({"content": prompt} if prompt else {}) | ({"tools": offered} if offered else {})
    rest = [{key: value for key, value in message.items() if key != "tools"} for message in messages[has_system:]]
    return [first, *rest]


def role_of(message: dict) -> str | None:
    """The role of a message as it is written, in our words."""
    role = message.get("role") or message.get("from")
    return ROLES.get(role) if isinstance(role, str) else None


def normalise_message(raw: dict, unused: list[str]) -> list[dict]:
    """A message as it is written → those of the chat format, one or more. Raises ValueError saying what is wrong."""
    message, role = dict(raw), role_of(raw)
    if role is None:
        raise ValueError(f"unknown role {raw['role']!r:.40}; the roles are {', '.join(ROLES)}" if raw.get("role") else
                         f"it has no role, but {list_keys(raw)}")
    for alias, name in ALIASES.items():
        if message.get(alias) is not None and message.get(name) in (None, ""):
            message[name] = message.pop(alias)
    keys = ANSWER_KEYS if role == "assistant" else MESSAGE_KEYS
    unused += unused_keys(message, keys, "message.")
    message = {key: value for key, value in message.items() if key in keys or key in ANSWER_KEYS and not value}
    if message["role"] == "function_call":
        message |= {"content": "", "function_call": message.get("content")}
    message["role"] = role
    if isinstance(message.get("content"), list):
        message["content"] = join_parts(message["content"])
    content = message.get("content")
    if not isinstance(content, str | None):
        raise ValueError(f"content must be text, not {type(content).__name__}")
    switches = [(name, message.pop(name)) for name in SWITCHES if name in message]
    for name, value in switches:
        if value not in (None, 0, 1):
            raise ValueError(f"{name} is {value!r:.40}, not 0, 1, true or false")
        if value and role != "assistant":
            unused.append(f"message.{name}")
    if role == "assistant":
        learned = all(value != 0 for _, value in switches)
        return [normalise_answer(message) | ({} if learned else {"train": False})]
    if content and content.lstrip().startswith("<tool_response>"):
        before, *responses = re.split(r"<tool_response>\n?(.*?)\n?</tool_response>", content, flags=re.DOTALL)
        if responses and not any(text.strip() for text in (before, *responses[1::2])):
            return [message | {"role": "tool", "content": text} for text in responses[::2]]
    return [message]


def join_parts(parts: list) -> str:
    """The text of a content that is written in parts."""
    for number, part in enumerate(parts, 1):
        if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"this model reads text only; part {number} of the content is {kind!s:.40}")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def normalise_answer(message: dict) -> dict:
    """An assistant's message, with the reasoning and the calls that its content spells out in fields of their own."""
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    if not isinstance(reasoning, str):
        raise ValueError(f"reasoning_content must be text, not {type(reasoning).__name__}")
    calls, found = parse_tool_calls(message), {}
    if "<think>" in content or "</think>" in content:
        thought, closed, content = content.partition("</think>")
        before, _, thought = thought.rpartition("<think>")
        if not closed or before.strip():
            raise ValueError("text before <think>" if closed else "a <think> that is not closed")
        if reasoning or "<think>" in content or "</think>" in content:
            raise ValueError("a second think block; an answer has one")
        content, reasoning = content.lstrip("\n"), thought.strip("\n")
        found |= {"content": content, "reasoning_content": reasoning}
    if "<tool_call>" in content or "</tool_call>" in content:
        content, *parts = re.split(r"<tool_call>(.*?)</tool_call>", content, flags=re.DOTALL)
        spelt = parse_tool_calls({"tool_calls": [parse_json(part, "a <tool_call>", dict) for part in parts[::2]]})
        if "tool_call>" in content or any(text.strip() for text in parts[1::2]):
            raise ValueError("a <tool_call> that is not closed, or text after one")
        if calls not in ([], spelt):
            raise ValueError("other tool_calls than in the content")
        calls, content = spelt, content.rstrip("\n")
        found |= {"content": content, "tool_calls": calls}
    if old := message.pop("function_call", None):
        if calls:
            raise ValueError("function_call beside tool_calls")
        old = read_json(old) if isinstance(old, str) else old
        calls = found["tool_calls"] = parse_tool_calls({"tool_calls": old if isinstance(old, list) else [old]})
    if not (content.strip() or calls or reasoning.strip()):
        raise ValueError("the answer is empty")
    return message | found
