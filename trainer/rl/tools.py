"""The tools a model may call: `call_tool` checks the arguments and runs one; `@tool` adds your own.

Nothing a model writes can raise, hang or reach beyond the tool: what goes wrong is a result, {"error": why}. With a
seed every result depends on the seed and the arguments alone, as training needs it. Weather, exchange rates and
translations are INVENTED (`MOCKED`): no network is asked, whatever the seed.
"""

import ast
import inspect
import json
import math
import operator
import queue
import random
import re
import threading
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from zoneinfo import ZoneInfo

from dataset import sample_world
from model.chat import check_text, parse_json
from model.cli import first_line

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
MOCKED = ("get_current_weather", "get_exchange_rate", "translate_text")


@dataclass(frozen=True)
class Tool:
    """A function a model may call: parameter → (type, needed), how it is described, seconds it may take."""

    function: Callable
    parameters: dict[str, tuple[type, bool]]
    schema: dict  # as OpenAI describes a function
    timeout: float | None
    seeded: bool  # takes the keyword `seed`, which no caller sees

    def check(self, arguments: dict) -> dict:
        """The arguments as the function wants them. Raises ValueError: unknown, missing, or of another type."""
        if unknown := sorted(set(arguments) - set(self.parameters)):
            raise ValueError(f"unknown argument {unknown[0]!a:.40}; known: {', '.join(self.parameters) or 'none'}")
        if missing := [name for name, (_, needed) in self.parameters.items() if needed and name not in arguments]:
            raise ValueError(f"missing argument {missing[0]!a}")
        return {name: coerce(name, value, self.parameters[name][0]) for name, value in arguments.items()
                if value is not None or self.parameters[name][1]}


TOOLS: dict[str, Tool] = {}
SCHEMAS: dict[str, dict] = {}  # what a model is told of each tool


def tool(function: Callable | None = None, *, timeout: float | None = 5.0) -> Callable:
    """Register a function for models to call: `@tool`, or `@tool(timeout=seconds)` (None: run it at once, unwatched).

    Its schema comes from its name, its annotations and the first line of its docstring. It returns a dict, or a value
    for {"result": value}; what it raises becomes {"error": …}. One that overruns its time is left behind in its thread.
    """
    if function is None:
        return lambda function: tool(function, timeout=timeout)
    name, hints = function.__name__, typing.get_type_hints(function)
    own = {key: value for key, value in inspect.signature(function).parameters.items() if key != "seed"}
    kinds = {key: json_type(hints.get(key, object)) for key in own}
    parameters = {key: (kinds[key], value.default is value.empty) for key, value in own.items()}
    properties = {key: {"type": JSON_TYPES[kind]} if kind in JSON_TYPES else {} for key, kind in kinds.items()}
    needed = [key for key, (_, need) in parameters.items() if need]
    described = {"name": name, "description": (inspect.getdoc(function) or name).splitlines()[0],
                 "parameters": {"type": "object", "properties": properties, "required": needed}}
    schema = {"type": "function", "function": described}
    if name in sample_world.TOOLS:  # described as models have read of it there
        schema = sample_world.tool_schema(name)
    seeded = "seed" in inspect.signature(function).parameters
    TOOLS[name], SCHEMAS[name] = Tool(function, parameters, schema, timeout, seeded), schema
    return function


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
        given = known.check(parse_json(arguments, "arguments", dict))
        result = run_with_timeout(known.timeout, known.function, given | ({"seed": seed} if known.seeded else {}))
        result = result if isinstance(result, dict) else {"result": result}
        check_text(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return result
    except Exception as error:  # of a user's tool anything may come, and a conversation goes on
        return {"error": f"{first_line(error)!s:.200}".encode("ascii", "backslashreplace").decode()}


def run_with_timeout(seconds: float | None, function: Callable, arguments: dict) -> object:
    """What the function returns or raises, if that takes no longer than `seconds`; else ValueError."""
    if seconds is None:
        return function(**arguments)
    box: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((function(**arguments), None))
        except BaseException as error:  # also SystemExit: it would end the thread without a word
            box.put((None, error if isinstance(error, Exception) else ValueError(type(error).__name__)))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        raise ValueError(f"no result within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def coerce(name: str, value: object, kind: type) -> object:
    """`value` if it is of the kind; 5.0 will do for 5. Raises ValueError."""
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"argument {name}: not a finite number")
        if kind is float or value == int(value):
            return int(value) if kind is int else value
    elif kind not in JSON_TYPES or isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise ValueError(f"argument {name}: {JSON_TYPES[kind]} expected, not {json.dumps(value):.40}")


# -- arithmetic --------------------------------------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos}
FUNCTIONS = {"sqrt": math.sqrt, "abs": abs}
UNICODE_OPERATORS = str.maketrans(
    {"×": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "（": "(", "）": ")", "＋": "+", "，": ","})
LONGEST, MOST_BITS = 500, 1024  # characters of an expression; a float ends at 2^1024


def power(a: int | float, b: int | float) -> int | float:
    if abs(b) > MOST_BITS or isinstance(a, int) and a.bit_length() * abs(b) > MOST_BITS:
        raise ValueError("power too large")
    if a < 0 and b != int(b):
        raise ValueError("root of a negative number")
    return a ** b


@tool(timeout=None)
def calculate_math(expression: str) -> int | float:
    """The value of numbers with + - * / // % ** (or × ÷ ^), brackets, sqrt() and abs().

    The syntax tree is walked, nothing is executed; its size and the size of every number in it are bounded.
    Raises ValueError when it is anything else.
    """
    def value(node: ast.AST) -> int | float:
        match node:
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=operation, operand=a) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(a))
            case ast.BinOp(left=a, op=ast.Pow(), right=b):
                return power(value(a), value(b))
            case ast.BinOp(left=a, op=operation, right=b) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(a), value(b))
            case ast.Call(func=ast.Name(id=name), args=[a], keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](value(a))
        raise ValueError("only numbers, + - * / // % **, brackets, sqrt and abs")

    if len(expression) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    try:
        return plain(value(ast.parse(expression.strip().translate(UNICODE_OPERATORS), mode="eval").body))
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(getattr(error, "msg", None) or str(error) or type(error).__name__) from None


def plain(number: int | float | Fraction) -> int | float:
    """A number as people write it: whole if it is, else 12 digits. Raises ValueError for what is none, or too large."""
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return int(number) if number == int(number) and abs(number) < 1e300 else float(f"{float(number):.12g}")


# -- measures, texts, chance and time ----------------------------------------------------------------------------------

UNITS = {  # of each dimension: names → how many of its first unit
    "length": {"m meter metre 米": "1", "km kilometer kilometre 公里 千米": "1000", "mi mile 英里": "1609.344",
               "cm centimeter centimetre 厘米": "0.01", "mm millimeter millimetre 毫米": "0.001",
               "yd yard 码": "0.9144", "ft foot feet 英尺": "0.3048", "in inch inche 英寸": "0.0254"},
    "mass": {"kg kilogram 千克 公斤": "1", "g gram 克": "0.001", "mg milligram 毫克": "0.000001", "jin 斤": "0.5",
             "t ton tonne 吨": "1000", "lb pound 磅": "0.45359237", "oz ounce 盎司": "0.028349523125"},
    "time": {"s sec second 秒": "1", "min minute 分钟 分": "60", "h hr hour 小时": "3600", "d day 天": "86400"},
    "volume": {"l liter litre 升": "1", "ml milliliter millilitre 毫升": "0.001", "gal gallon 加仑": "3.785411784"},
    "speed": {"m/s": "1", "km/h kmh kph": "1000/3600", "mph": "0.44704"},
    "temperature": {"c °c celsiu 摄氏度": "1", "f °f fahrenheit 华氏度": "5/9", "k kelvin 开尔文": "1"},
}
ZERO_AT = {"f": Fraction(-160, 9), "k": Fraction("-273.15")}  # in degrees Celsius


def unit(name: str) -> tuple[str, Fraction, Fraction]:
    """Dimension, size and zero of a unit, in singular or plural."""
    wanted = name.strip().lower()
    for dimension, units in UNITS.items():
        for names, size in units.items():
            if {wanted, wanted.removesuffix("s"), wanted.removeprefix("degrees ")} & set(names.split()):
                above, _, below = size.partition("/")
                return dimension, Fraction(above) / Fraction(below or 1), ZERO_AT.get(names.split()[0], Fraction(0))
    raise ValueError(f"unknown unit {name!a:.40}")


@tool(timeout=None)
def unit_converter(value: float, from_unit: str, to_unit: str) -> int | float:
    """Convert units of length, mass, time, volume, speed and temperature"""
    (dimension, size, zero), (other, new_size, new_zero) = unit(from_unit), unit(to_unit)
    if dimension != other:
        raise ValueError(f"{dimension} is no {other}")
    return plain((Fraction(str(value)) * size + zero - new_zero) / new_size)


@tool(timeout=None)
def text_length(text: str) -> dict:
    """Count characters"""
    return {"length": len(text)}


def seeded_rng(seed: int | None, *what: str | int) -> random.Random:
    """Chance that depends on the seed and what is asked, and on nothing else."""
    return random.Random(f"{seed} {what}".lower())


@tool(timeout=None)
def random_number(min: int = 0, max: int = 100, seed: int | None = None) -> int:
    """Draw a whole number, both ends included"""
    if min > max:
        raise ValueError("min is above max")
    return (random if seed is None else seeded_rng(seed, "number", min, max)).randint(min, max)


@tool(timeout=None)
def get_current_time(timezone: str = "UTC", seed: int | None = None) -> dict:
    """The time in a zone like Asia/Tokyo; with a seed, an invented one"""
    try:
        zone = ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"unknown timezone {timezone!a:.40}") from None
    drawn = seeded_rng(seed, "time", timezone)
    return {"time": f"{drawn.randrange(24):02}:{drawn.randrange(60):02}" if seed is not None
            else f"{datetime.now(zone):%H:%M}"}


@tool(timeout=None)
def get_current_weather(location: str, unit: str = "celsius", seed: int | None = None) -> dict:
    """Weather of a place (invented)"""
    drawn = seeded_rng(seed, "weather", location.strip())
    degrees, sky = drawn.randint(1, 35), drawn.choice(sample_world.WEATHER)
    return {"temperature": plain(unit_converter(degrees, "celsius", unit)), "condition": sky[chinese(location)]}


@tool(timeout=None)
def get_exchange_rate(from_currency: str, to_currency: str, seed: int | None = None) -> dict:
    """Exchange rate of two currencies like USD and CNY (invented)"""
    for currency in (from_currency, to_currency):
        if not re.fullmatch("[A-Za-z]{3}", currency):
            raise ValueError(f"unknown currency {currency!a:.40}")
    if from_currency.lower() == to_currency.lower():
        return {"rate": 1}
    return {"rate": seeded_rng(seed, "rate", from_currency, to_currency).randint(11, 999) / 100}


@tool(timeout=None)
def translate_text(text: str, target_language: str) -> dict:
    """Translate words of the sample world (a mock: what it does not know stays as it is)"""
    to = int(target_language.strip().lower() in ("chinese", "zh", "zh-cn", "中文", "汉语"))
    known = {pair[1 - to]: pair[to] for pair in (*sample_world.COLOURS, *sample_world.FOODS)}
    words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    said = re.sub(words, lambda found: known[found[0]] + " " * (1 - to), text)
    return {"text": said.strip() if not to else re.sub(r"(?<=[一-鿿]) (?=[一-鿿])", "", said)}


def chinese(text: str) -> bool:
    return any("一" <= character <= "鿿" for character in text)
