"""The tools that a model may call: `call_tool` checks the arguments and runs one; `@tool` adds your own.

Nothing that a model writes can raise, hang or reach beyond the tool: what goes wrong is a result, {"error": why}.
"""

import inspect
import json
import math
import queue
import threading
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from model.chat import check_text, parse_json
from model.cli import first_line
from trainer.rl.builtin_tools import BUILTIN_TOOLS

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    function: Callable
    parameters: dict[str, tuple[type, bool]]  # name → type, and whether it is required
    timeout: float | None  # seconds; None: run in the caller's thread
    seeded: bool  # takes the keyword `seed`, which no caller sees

    def check(self, arguments: dict) -> dict:
        """The arguments as the function takes them. Raises ValueError: unknown, missing, or of another type."""
        if unknown := sorted(set(arguments) - set(self.parameters)):
            raise ValueError(f"unknown argument {unknown[0]!a:.40}; known: {', '.join(self.parameters) or 'none'}")
        if missing := [name for name, (_, required) in self.parameters.items() if required and name not in arguments]:
            raise ValueError(f"missing argument {missing[0]!a}")
        return {name: coerce(name, value, self.parameters[name][0]) for name, value in arguments.items()
                if value is not None or self.parameters[name][1]}


TOOLS: dict[str, Tool] = {}
SCHEMAS: dict[str, dict] = {}  # of each tool, as OpenAI describes a function: what a model is told


def tool(function: Callable | None = None, *, timeout: float | None = 5.0) -> Callable:
    """Register a function for models to call: `@tool`, or `@tool(timeout=seconds)` (None: run it in this thread).

    Its schema comes from its name, its annotations and the first line of its docstring. It returns a dict, or a value
    for {"result": value}; what it raises becomes {"error": …}. One that exceeds its time
    keeps running in its thread, and its result is dropped.
    """
    if function is None:
        return lambda function: tool(function, timeout=timeout)
    parameters = read_parameters(function)
    properties = {name: {"type": JSON_TYPES[kind]} if kind in JSON_TYPES else {}
                  for name, (kind, _) in parameters.items()}
    description = (inspect.getdoc(function) or function.__name__).splitlines()[0]
    register(function, parameters, timeout, description, properties,
             [name for name, (_, required) in parameters.items() if required])
    return function


def register(function: Callable, parameters: dict[str, tuple[type, bool]], timeout: float | None, description: str,
             properties: dict[str, dict], required: list[str]) -> None:
    name, seeded = function.__name__, "seed" in inspect.signature(function).parameters
    TOOLS[name] = Tool(function, parameters, timeout, seeded)
    SCHEMAS[name] = {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": properties, "required": required}}}


def read_parameters(function: Callable) -> dict[str, tuple[type, bool]]:
    """Of each parameter but `seed`: its JSON type, and whether it is required."""
    hints = typing.get_type_hints(function)
    return {name: (json_type(hints.get(name, object)), parameter.default is parameter.empty)
            for name, parameter in inspect.signature(function).parameters.items() if name != "seed"}


def json_type(hint: type) -> type:
    """What JSON knows of an annotation: list of list[str], float of int | float, str of str | None."""
    parts = {json_type(part) for part in typing.get_args(hint) if part is not type(None)}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return parts.pop() if len(parts) == 1 else float if parts == {int, float} else object
    return typing.get_origin(hint) or hint


def call_tool(name: str, arguments: dict | str, seed: int | None = None) -> dict:
    """Run a tool on arguments (an object, or JSON text); → its result, or {"error": what is wrong}. Never raises."""
    try:
        if name not in TOOLS:
            raise ValueError(f"unknown tool {name!a:.80}")
        known = TOOLS[name]
        checked = known.check(parse_json(arguments, "arguments", dict))
        result = run_with_timeout(known.timeout, known.function, checked | ({"seed": seed} if known.seeded else {}))
        result = result if isinstance(result, dict) else {"result": result}
        check_text(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return result
    except Exception as error:  # a user's tool may raise anything, and the conversation goes on
        return {"error": f"{first_line(error)!s:.200}".encode("ascii", "backslashreplace").decode()}


def call_offered_tool(name: str, arguments: dict | str, offered: Iterable[str], call: Callable = call_tool) -> dict:
    """The same by `call`, for a tool that is one of `offered`; else {"error": …}, whatever tools there are."""
    if name in offered:
        return call(name=name, arguments=arguments)
    return {"error": f"unknown tool {name!a:.80}; offered: {', '.join(offered) or 'none'}"}


def run_with_timeout(seconds: float | None, function: Callable, arguments: dict) -> object:
    """What the function returns or raises, if that takes no longer than `seconds`; else ValueError."""
    if seconds is None:
        return function(**arguments)
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((function(**arguments), None))
        except BaseException as error:  # also SystemExit: it would end the thread in silence
            outcome.put((None, error if isinstance(error, Exception) else ValueError(type(error).__name__)))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise ValueError(f"no result within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def coerce(name: str, value: object, kind: type) -> object:
    """`value` if it is of the kind; 5.0 is accepted for 5. Raises ValueError."""
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"argument {name}: not a finite number")
        if kind is float or value == int(value):
            return int(value) if kind is int else value
    elif kind not in JSON_TYPES or isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise ValueError(f"argument {name}: {JSON_TYPES[kind]} expected, not {json.dumps(value):.40}")


for function, (description, types_by_name) in BUILTIN_TOOLS.items():
    register(function, read_parameters(function), None, description,
             {name: {"type": kind} for name, kind in types_by_name.items()}, list(types_by_name))
