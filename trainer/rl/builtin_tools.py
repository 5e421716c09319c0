"""The eight tools that models are trained with. Each is a plain function; what it raises becomes an error result.

With a seed every result depends on the seed and the arguments alone. Weather, exchange rates and translations are
INVENTED (`MOCKED`): no network is asked, whatever the seed.
"""

import ast
import math
import operator
import random
import re
from collections.abc import Callable
from datetime import datetime
from fractions import Fraction
from zoneinfo import ZoneInfo

# -- arithmetic --------------------------------------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos}
FUNCTIONS = {"sqrt": math.sqrt, "abs": abs}
UNICODE_OPERATORS = str.maketrans(
    {"×": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "（": "(", "）": ")", "＋": "+", "，": ","})
MAX_EXPRESSION_LEN, MAX_BITS = 500, 1024  # characters; a float ends at 2^1024


def calculate_math(expression: str) -> int | float:
    """The value of numbers with + - * / // % ** (or × ÷ ^), brackets, sqrt() and abs().

    The syntax tree is walked, nothing is executed; its size and the size of every number in it are bounded.
    Raises ValueError when it is anything else.
    """
    def evaluate(node: ast.AST) -> int | float:
        match node:
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=operation, operand=a) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](evaluate(a))
            case ast.BinOp(left=a, op=ast.Pow(), right=b):
                return power(evaluate(a), evaluate(b))
            case ast.BinOp(left=a, op=operation, right=b) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](evaluate(a), evaluate(b))
            case ast.Call(func=ast.Name(id=name), args=[a], keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](evaluate(a))
        raise ValueError("only numbers, + - * / // % **, brackets, sqrt and abs")

    if len(expression) > MAX_EXPRESSION_LEN:
        raise ValueError(f"longer than {MAX_EXPRESSION_LEN} characters")
    try:
        return round_number(evaluate(ast.parse(expression.strip().translate(UNICODE_OPERATORS), mode="eval").body))
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(getattr(error, "msg", None) or str(error) or type(error).__name__) from None


def power(a: int | float, b: int | float) -> int | float:
    if abs(b) > MAX_BITS or isinstance(a, int) and a.bit_length() * abs(b) > MAX_BITS:
        raise ValueError("power too large")
    if a < 0 and b != int(b):
        raise ValueError("root of a negative number")
    return a ** b


def round_number(number: int | float | Fraction) -> int | float:
    """An int if it is whole, else a float of 12 digits. Raises ValueError for what is not finite, or too large."""
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return int(number) if number == int(number) and abs(number) < 1e300 else float(f"{float(number):.12g}")


# -- units and texts ---------------------------------------------------------------------------------------------------

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
ZERO_POINTS = {"f": Fraction(-160, 9), "k": Fraction("-273.15")}  # in degrees Celsius


def unit_converter(value: float, from_unit: str, to_unit: str) -> int | float:
    """Convert between units of length, mass, time, volume, speed or temperature."""
    (dimension, size, zero), (other, new_size, new_zero) = find_unit(from_unit), find_unit(to_unit)
    if dimension != other:
        raise ValueError(f"{dimension} is no {other}")
    return round_number((Fraction(str(value)) * size + zero - new_zero) / new_size)


def find_unit(name: str) -> tuple[str, Fraction, Fraction]:
    """Dimension, size and zero point of a unit, in singular or plural."""
    name = name.strip().lower()
    spellings = {name, name.removesuffix("s"), name.removeprefix("degrees ")}
    for dimension, units in UNITS.items():
        for names, size in units.items():
            if spellings & set(names.split()):
                numerator, _, denominator = size.partition("/")
                zero = ZERO_POINTS.get(names.split()[0], Fraction(0))
                return dimension, Fraction(numerator) / Fraction(denominator or 1), zero
    raise ValueError(f"unknown unit {name!a:.40}")


def text_length(text: str) -> dict:
    """Count the characters of a text."""
    return {"length": len(text)}


# -- chance and time ---------------------------------------------------------------------------------------------------


def seeded_rng(seed: int | None, *key: str | int) -> random.Random:
    """A generator that depends on the seed and the key alone."""
    return random.Random(f"{seed} {key}".lower())


def random_number(min: int = 0, max: int = 100, seed: int | None = None) -> int:
    """Draw a whole number, both ends included."""
    if min > max:
        raise ValueError("min is above max")
    return (random if seed is None else seeded_rng(seed, "number", min, max)).randint(min, max)


def get_current_time(timezone: str = "Asia/Shanghai", seed: int | None = None) -> dict:
    """The time in a zone like Asia/Tokyo; with a seed, an invented one."""
    try:
        zone = ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"unknown timezone {timezone!a:.40}") from None
    rng = seeded_rng(seed, "time", timezone)
    return {"time": f"{rng.randrange(24):02}:{rng.randrange(60):02}" if seed is not None
            else f"{datetime.now(zone):%H:%M}"}


# -- mocks -------------------------------------------------------------------------------------------------------------

MOCKED = ("get_current_weather", "get_exchange_rate", "translate_text")
WEATHER = re.findall("(\\w+)=(\\w+)", "sunny=晴天 cloudy=多云 rainy=下雨 windy=刮风 snowy=下雪 foggy=有雾")
DICTIONARY = re.findall("(\\w+)=(\\w+)", """red=红色 blue=蓝色 green=绿色 yellow=黄色 white=白色 black=黑色 purple=紫色
    silver=银色 apples=苹果 bananas=香蕉 mangoes=芒果 peaches=桃子 pears=梨 grapes=葡萄 lemons=柠檬 corn=玉米
    melons=甜瓜 cherries=樱桃 bread=面包 rice=米饭 noodles=面条 cake=蛋糕 cheese=奶酪 eggs=鸡蛋 fish=鱼 tofu=豆腐
    potatoes=土豆 carrots=胡萝卜 peanuts=花生 mushrooms=蘑菇 chocolate=巧克力 dumplings=饺子""")


def get_current_weather(location: str, unit: str = "celsius", seed: int | None = None) -> dict:
    """The weather of a place (invented)."""
    rng = seeded_rng(seed, "weather", location.strip())
    degrees, condition = rng.randint(1, 35), rng.choice(WEATHER)
    is_chinese = any("一" <= character <= "鿿" for character in location)
    return {"temperature": unit_converter(degrees, "celsius", unit), "condition": condition[is_chinese]}


def get_exchange_rate(from_currency: str, to_currency: str, seed: int | None = None) -> dict:
    """The exchange rate of two currencies like USD and CNY (invented)."""
    for currency in (from_currency, to_currency):
        if not re.fullmatch("[A-Za-z]{3}", currency):
            raise ValueError(f"unknown currency {currency!a:.40}")
    if from_currency.lower() == to_currency.lower():
        return {"rate": 1}
    return {"rate": seeded_rng(seed, "rate", from_currency, to_currency).randint(11, 999) / 100}


def translate_text(text: str, target_language: str) -> dict:
    """Translate the words of DICTIONARY; everything else stays as it is."""
    to = int(target_language.strip().lower() in ("chinese", "zh", "zh-cn", "中文", "汉语"))
    translations = {pair[1 - to]: pair[to] for pair in DICTIONARY}
    words = "|".join(sorted(translations, key=len, reverse=True))
    translated = re.sub(words, lambda match: translations[match[0]] + " " * (1 - to), text)
    return {"text": translated.strip() if not to else re.sub(r"(?<=[一-鿿]) (?=[一-鿿])", "", translated)}


# function → description and parameters, as models have seen them in training; all are required
BUILTIN_TOOLS: dict[Callable, tuple[str, dict[str, str]]] = {
    calculate_math: ("Calculate", {"expression": "string"}),
    unit_converter: ("Convert units", {"value": "integer", "from_unit": "string", "to_unit": "string"}),
    text_length: ("Count characters", {"text": "string"}),
    random_number: ("Draw a number", {"min": "integer", "max": "integer"}),
    get_current_time: ("Get time", {"timezone": "string"}),
    get_current_weather: ("Get weather", {"location": "string"}),
    get_exchange_rate: ("Get exchange rate", {"from_currency": "string", "to_currency": "string"}),
    translate_text: ("Translate", {"text": "string", "target_language": "string"}),
}
