"""The eight tools that models are trained with. Each is a plain function; what it raises becomes an error result.

Their results have the shapes of MiniMind's. With a seed every result depends on the seed and the arguments alone.
Weather, exchange rates and translations are INVENTED (`MOCKED`): no network is asked, whatever the seed. The values
that MiniMind's agent_rl rows expect (`gt`) are among them.
"""

import ast
import math
import operator
import random
import re
from collections.abc import Callable
from datetime import datetime, timezone
from fractions import Fraction
from zoneinfo import ZoneInfo

# -- arithmetic --------------------------------------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos}
FUNCTIONS = {"sqrt": math.sqrt, "abs": abs}
UNICODE_OPERATORS = str.maketrans(
    {"×": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "（": "(", "）": ")", "＋": "+", "，": ","})
MAX_EXPRESSION_LEN, MAX_BITS = 500, 1024  # characters; a float ends at 2^1024


def calculate_math(expression: str) -> str:
    """The value, in digits, of numbers with + - * / // % ** (or × ÷ ^), brackets, sqrt() and abs().

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
        tree = ast.parse(expression.strip().translate(UNICODE_OPERATORS), mode="eval")
        return str(round_number(evaluate(tree.body)))
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
    """Convert between units of length, mass, time, volume, speed or temperature.

    → to four decimals; a result below 0.01 to four significant digits.
    """
    (dimension, size, zero), (other, new_size, new_zero) = find_unit(from_unit), find_unit(to_unit)
    if dimension != other:
        raise ValueError(f"{dimension} is no {other}")
    number = round_number((Fraction(str(value)) * size + zero - new_zero) / new_size)
    return round(number, 4) if abs(number) >= 0.01 else round_number(float(f"{number:.4g}"))


def find_unit(name: str) -> tuple[str, Fraction, Fraction]:
    """Dimension, size and zero point of a unit, in singular or plural."""
    name = name.strip().lower().removeprefix("degrees ").removeprefix("degree ")
    spellings = {name, name.removesuffix("s")}
    for dimension, units in UNITS.items():
        for names, size in units.items():
            if spellings & set(names.split()):
                numerator, _, denominator = size.partition("/")
                zero = ZERO_POINTS.get(names.split()[0], Fraction(0))
                return dimension, Fraction(numerator) / Fraction(denominator or 1), zero
    raise ValueError(f"unknown unit {name!a:.40}")


def text_length(text: str) -> dict:
    """Count the characters and words of a text."""
    return {"characters": len(text), "words": len(text.split())}


# -- chance and time ---------------------------------------------------------------------------------------------------

FIXED_TIME = datetime(2025, 3, 7, 6, 30, tzinfo=timezone.utc)  # the one instant of all zones in MiniMind's table


def seeded_rng(seed: int | None, *key: str | int) -> random.Random:
    """A generator that depends on the seed and the key alone."""
    return random.Random(f"{seed} {key}".lower())


def random_number(min: int = 0, max: int = 100, seed: int | None = None) -> int:
    """Draw a whole number, both ends included."""
    if min > max:
        raise ValueError("min is above max")
    return (random if seed is None else seeded_rng(seed, "number", min, max)).randint(min, max)


def get_current_time(timezone: str = "Asia/Shanghai", seed: int | None = None) -> dict:
    """Date and time in a zone like Asia/Tokyo; with a seed, those of `FIXED_TIME`."""
    try:
        zone = ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"unknown timezone {timezone!a:.40}") from None
    time = datetime.now(zone) if seed is None else FIXED_TIME.astimezone(zone)
    return {"datetime": f"{time:%Y-%m-%d %H:%M:%S}", "timezone": timezone}


# -- mocks -------------------------------------------------------------------------------------------------------------

MOCKED = ("get_current_weather", "get_exchange_rate", "translate_text")
WEATHER = re.findall("(\\w+)=(\\w+)", "sunny=晴天 cloudy=多云 rainy=下雨 windy=刮风 snowy=下雪 foggy=有雾")
DICTIONARY = re.findall("(\\w+)=(\\w+)", """red=红色 blue=蓝色 green=绿色 yellow=黄色 white=白色 black=黑色 purple=紫色
    silver=银色 apples=苹果 bananas=香蕉 mangoes=芒果 peaches=桃子 pears=梨 grapes=葡萄 lemons=柠檬 corn=玉米
    melons=甜瓜 cherries=樱桃 bread=面包 rice=米饭 noodles=面条 cake=蛋糕 cheese=奶酪 eggs=鸡蛋 fish=鱼 tofu=豆腐
    potatoes=土豆 carrots=胡萝卜 peanuts=花生 mushrooms=蘑菇 chocolate=巧克力 dumplings=饺子""")


# the entries of MiniMind's tables
KNOWN_WEATHER = {
    "北京": (28, "晴"), "上海": (15, "多云"), "广州": (32, "闷热"), "深圳": (30, "晴"), "杭州": (22, "阴"),
    "成都": (18, "小雨"), "武汉": (25, "多云"), "南京": (20, "晴"), "西安": (16, "大风"), "重庆": (26, "阴"),
    "tokyo": (12, "晴"), "new york": (8, "多云"), "london": (5, "小雨"), "paris": (10, "阴"), "sydney": (25, "晴朗")}
KNOWN_RATES = {"USD CNY": 7.21, "EUR CNY": 7.85, "GBP CNY": 9.12, "JPY CNY": 0.048, "USD EUR": 0.92, "USD GBP": 0.79,
               "CNY JPY": 20.83, "AUD CNY": 4.72}
KNOWN_TRANSLATIONS = {"你好世界": "Hello World", "Good morning": "早上好", "今天天气真好": "The weather is nice today",
                      "I love programming": "我喜欢编程", "机器学习很有趣": "Machine learning is interesting",
                      "Happy birthday": "生日快乐"}


SCALES = [find_unit(scale) for scale in ("celsius", "fahrenheit", "kelvin")]


def get_current_weather(location: str, unit: str = "celsius", seed: int | None = None) -> dict:
    """The weather of a place (invented)."""
    rng = seeded_rng(seed, "weather", location.strip())
    is_chinese = any("一" <= character <= "鿿" for character in location)
    drawn = rng.randint(1, 35), rng.choice(WEATHER)[is_chinese]
    degrees, condition = KNOWN_WEATHER.get(location.strip().lower(), drawn)
    temperature, symbol = unit_converter(degrees, "celsius", unit), "CFK"[SCALES.index(find_unit(unit))]
    return {"city": location, "temperature": f"{temperature}°{symbol}",
            "humidity": f"{rng.randint(30, 90)}%", "condition": condition}


def get_exchange_rate(from_currency: str, to_currency: str, seed: int | None = None) -> dict:
    """The exchange rate of two currencies like USD and CNY (invented)."""
    for currency in (from_currency, to_currency):
        if not re.fullmatch("[A-Za-z]{3}", currency):
            raise ValueError(f"unknown currency {currency!a:.40}")
    drawn = seeded_rng(seed, "rate", from_currency, to_currency).randint(11, 999) / 100
    rate = 1 if from_currency.lower() == to_currency.lower() else drawn
    return {"from": from_currency, "to": to_currency,
            "rate": KNOWN_RATES.get(f"{from_currency} {to_currency}".upper(), rate)}


def translate_text(text: str, target_language: str) -> dict:
    """Translate the words of DICTIONARY and KNOWN_TRANSLATIONS; everything else stays as it is."""
    to = int(target_language.strip().lower() in ("chinese", "zh", "zh-cn", "中文", "汉语"))
    translations = {pair[1 - to]: pair[to] for pair in DICTIONARY}
    words = "|".join(sorted(translations, key=len, reverse=True))
    translated = re.sub(words, lambda match: translations[match[0]] + " " * (1 - to), text)
    translated = re.sub(r"(?<=[一-鿿]) (?=[一-鿿])", "", translated) if to else translated.strip()
    known = KNOWN_TRANSLATIONS.get(text.strip(), "")
    return {"translated_text": known if known and bool(to) == (not known.isascii()) else translated}


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
