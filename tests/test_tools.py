"""Tools: what they compute, that nothing a model writes can raise, hang or escape, and that a seed decides."""

import json
import math
import random
import sys
import threading
import time
from datetime import datetime, timedelta

import pytest

from dataset import sample_texts, sample_world
from dataset.sample_texts import TOOLS as TASKS
from dataset.sample_world import World
from trainer.rl import tools
from trainer.rl.builtin_tools import WEATHER
from trainer.rl.tools import SCHEMAS, TOOLS, call_tool, tool


def worked_out(expression: str):
    return call_tool("calculate_math", {"expression": expression}).get("result")


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, value", [
    ("652 + 561", 1213), ("(179 - 131) * 122", 5856), ("-7 // 2 + 9 % 4", -3), ("1 / 4", 0.25), (" 2 * (3 - -1) ", 8),
    ("2 ** 10", 1024), ("2^3^2", 512), ("6 ÷ 4 × 2", 3), ("（1＋2）*3", 9), ("0.1 + 0.2", 0.3),
    ("sqrt(16) + abs(-2)", 6), ("-" * 499 + "1", -1), ("7 − 2", 5), ("2 ** -2", 0.25), ("10 / 5", 2),
    ("1e3 + 1", 1001)])
def test_sums_are_worked_out(text, value):
    assert worked_out(text) == str(value)


def test_random_sums_are_those_of_python():
    rng = random.Random(0)
    for _ in range(300):
        text = str(rng.randint(-99, 99))
        for _ in range(rng.randint(1, 8)):
            text = f"({text}) {rng.choice(['+', '-', '*', '//', '%'])} ({rng.choice([-1, 1]) * rng.randint(1, 99)})"
        assert worked_out(text) == str(eval(text))


@pytest.mark.parametrize("text", [
    "9**9**9**9", "9**9**9", "(" * 10_000_000, "(" * 300, "((9**300)**3)**300", "2**0.5**-9e9",
    "__import__('os')", "().__class__", "sqrt.__self__", "a + 1", "1 / 0", "0 ** -1", "1 +", "", "[1] * 9", "True + 1",
    "'a' * 9", "1 < 2", "1e308 * 1e308 // 1", "f(1)", "nan", "1e999", "1e999 - 1e999", "inf", "(-8) ** 0.5", "sqrt(-1)",
    "sqrt(1, 2)", "abs(x=1)", "1j", "lambda: 1", "1 if 1 else 2", "10 ** 308 * 10", "\0", "9" * 400,
    "*".join("9" * 250), "**".join("9" * 160), "99 % (1 - 1)", "sqrt(10**400)", "x := 1"])
def test_nothing_but_sums_is_worked_out_and_soon(text):
    began = time.process_time()
    result = call_tool("calculate_math", {"expression": text})
    assert list(result) == ["error"] or math.isfinite(float(result["result"])) and text == "*".join("9" * 250)
    assert time.process_time() - began < 0.1 and len(json.dumps(result)) < 400


# -- the other tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, unit, to, result", [
    (6000, "m", "km", 6), (3, "h", "min", 180), (100, "celsius", "fahrenheit", 212),
    (100, "degrees Celsius", "degree fahrenheit", 212), (32, "°F", "°C", 0),
    (0, "C", "kelvin", 273.15), (1, "mile", "meters", 1609.344), (2, "Pounds", "kg", 0.9072),
    (1, "feet", "inches", 12), (5, "公里", "米", 5000),
    (36, "km/h", "m/s", 10), (0.1, "m", "cm", 10), (1, "gallon", "liters", 3.7854), (1, "mm", "km", 0.000001)])
def test_units_are_converted(value, unit, to, result):
    assert call_tool("unit_converter", {"value": value, "from_unit": unit, "to_unit": to}) == {"result": result}


def test_what_can_be_computed_is_what_the_sample_world_says():
    world = World()
    world.split = "train"
    for number in range(300):
        world.lang = number % 2
        for name in ("calculate_math", "unit_converter", "text_length"):
            _, call, result, _ = world.task(name).messages
            (tool_call,), expected = json.loads(call["tool_calls"]), json.loads(result["content"])
            assert json.dumps(call_tool(**tool_call)) == json.dumps(expected)


def test_every_task_of_the_sample_world_has_a_result_of_its_shape():
    world = World()
    assert {name: sample_world.tool_schema(name) for name in TASKS} == SCHEMAS and set(TASKS) == set(TOOLS)
    assert list(sample_texts.WEATHER) == WEATHER
    for number, name in enumerate(list(TASKS) * 40):
        world.lang = number // len(TASKS) % 2
        _, call, result, _ = world.task(name).messages
        (tool_call,), expected = json.loads(call["tool_calls"]), json.loads(result["content"])
        result = call_tool(**tool_call, seed=1)
        assert list(result) == list(expected) and result == call_tool(**tool_call, seed=1)
        assert [isinstance(value, str) for value in result.values()] == [isinstance(v, str) for v in expected.values()]
        if name == "translate_text":
            assert result == expected


@pytest.mark.parametrize("name, arguments", [
    ("get_current_weather", {"location": "Lima"}),
    ("get_exchange_rate", {"from_currency": "CHF", "to_currency": "CNY"}), ("random_number", {"min": 1, "max": 10**9})])
def test_the_seed_decides_and_so_do_the_arguments(name, arguments):
    runs = [call_tool(name, arguments, seed=seed) for seed in range(20)]
    assert runs == [call_tool(name, dict(reversed(arguments.items())), seed=seed) for seed in range(20)]
    assert len({json.dumps(run) for run in runs}) > 10


def test_the_time_is_that_of_shanghai_unless_a_zone_is_named():
    unnamed, shanghai, utc = (call_tool("get_current_time", arguments, seed=1) for arguments in (
        {}, {"timezone": "Asia/Shanghai"}, {"timezone": "UTC"}))
    assert unnamed == shanghai != utc


def test_without_a_seed_time_and_chance_are_real_and_the_invented_stays():
    assert len({call_tool("random_number", {"min": 1, "max": 10**9})["result"] for _ in range(5)}) == 5
    here, there = (datetime.fromisoformat(call_tool("get_current_time", {"timezone": zone})["datetime"])
                   for zone in ("UTC", "Asia/Shanghai"))
    assert timedelta(hours=8) <= there - here < timedelta(hours=8, minutes=1)
    lima = {"location": "Lima"}
    assert call_tool("get_current_weather", lima) == call_tool("get_current_weather", lima)


@pytest.mark.parametrize("name, arguments, expected", [  # what MiniMind's agent_rl rows expect
    ("calculate_math", {"expression": "256 × 37"}, {"result": "9472"}),
    ("unit_converter", {"value": 100, "from_unit": "km", "to_unit": "miles"}, {"result": 62.1371}),
    ("get_current_time", {}, {"datetime": "2025-03-07 14:30:00", "timezone": "Asia/Shanghai"}),
    ("get_current_time", {"timezone": "Australia/Sydney"},
     {"datetime": "2025-03-07 17:30:00", "timezone": "Australia/Sydney"}),
    ("get_exchange_rate", {"from_currency": "usd", "to_currency": "CNY"}, {"from": "usd", "to": "CNY", "rate": 7.21}),
    ("translate_text", {"text": "Happy birthday", "target_language": "chinese"}, {"translated_text": "生日快乐"}),
    ("translate_text", {"text": "Happy birthday", "target_language": "english"}, {"translated_text": "Happy birthday"}),
    ("translate_text", {"text": "机器学习很有趣", "target_language": "english"},
     {"translated_text": "Machine learning is interesting"}),
    ("text_length", {"text": "Hi there"}, {"characters": 8, "words": 2})])
def test_results_are_the_published_ones(name, arguments, expected):
    assert call_tool(name, arguments, seed=random.randrange(99)) == expected


def test_weather_has_the_published_shape_in_either_unit():
    result = call_tool("get_current_weather", {"location": "北京"}, seed=1)
    assert list(result) == ["city", "temperature", "humidity", "condition"]
    assert (result["city"], result["temperature"], result["condition"]) == ("北京", "28°C", "晴")
    for unit, temperature in (("fahrenheit", "82.4°F"), ("°F", "82.4°F"), ("摄氏度", "28°C"), ("K", "301.15°K")):
        assert call_tool("get_current_weather", {"location": "北京", "unit": unit})["temperature"] == temperature
    assert "error" in call_tool("get_current_weather", {"location": "a", "unit": "m"})


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, arguments, expected", [
    ("nothing", {}, "unknown tool"), ("call_tool", {}, "unknown tool"), ("text_length", {}, "missing argument 'text'"),
    ("text_length", {"text": "a", "b": 1}, "unknown argument 'b'"), ("text_length", {"text": 3}, "string expected"),
    ("text_length", {"text": None}, "string expected"), ("text_length", "{", "not JSON"),
    ("text_length", "[]", "dict, not list"), ("text_length", "[" * 10_000_000, "not JSON"),
    ("unit_converter", {"value": "3", "from_unit": "m", "to_unit": "km"}, "number expected"),
    ("unit_converter", {"value": True, "from_unit": "m", "to_unit": "km"}, "number expected"),
    ("unit_converter", '{"value": NaN, "from_unit": "m", "to_unit": "km"}', "finite"),
    ("unit_converter", {"value": 10**400, "from_unit": "m", "to_unit": "km"}, "large"),
    ("unit_converter", {"value": 1, "from_unit": "m", "to_unit": "kg"}, "length is no mass"),
    ("unit_converter", {"value": 1, "from_unit": "m", "to_unit": "elephants"}, "unknown unit"),
    ("random_number", {"min": 1.5, "max": 3}, "integer expected"), ("random_number", {"min": 3, "max": 1}, "above"),
    ("get_current_time", {"timezone": "../../etc/passwd"}, "unknown timezone"),
    ("get_current_time", {"timezone": "Moon/Base"}, "unknown timezone"),
    ("get_exchange_rate", {"from_currency": "dollars", "to_currency": "CNY"}, "unknown currency"),
    ("translate_text", {"text": "\ud800", "target_language": "Chinese"}, "surrogate"),
    ("text_length", {"seed": 3, "text": "a"}, "unknown argument 'seed'"),
    ("random_number", {"seed": 3}, "unknown argument 'seed'")])
def test_a_wrong_call_is_an_error_and_no_exception(name, arguments, expected):
    result = call_tool(name, arguments)
    assert list(result) == ["error"] and expected in result["error"], result
    assert len(result["error"]) < 300 and json.dumps(result).encode()


def test_arguments_may_be_text_and_whole_numbers_written_as_decimals():
    assert call_tool("text_length", '{"text": "巴黎"}') == {"characters": 2, "words": 1}
    assert call_tool("random_number", {"min": 5.0, "max": 5}) == {"result": 5}


@pytest.fixture
def own(monkeypatch):
    """What a test registers is forgotten after it."""
    for name in ("TOOLS", "SCHEMAS"):
        monkeypatch.setattr(tools, name, dict(getattr(tools, name)))


def test_a_function_becomes_a_tool(own):
    @tool
    def area(width: float, height: float = 1, names: list[str] | None = None, loud: bool = False,
             count: int | float = 1, other=None):
        """The area of a rectangle.

        Not told.
        """
        return width * height

    function = tools.SCHEMAS["area"]["function"]
    assert function["description"] == "The area of a rectangle." and function["parameters"]["required"] == ["width"]
    assert {key: value.get("type") for key, value in function["parameters"]["properties"].items()} == {
        "width": "number", "height": "number", "names": "array", "loud": "boolean", "count": "number", "other": None}
    assert call_tool("area", {"width": 2, "names": None}) == {"result": 2}
    assert call_tool("area", {"width": 2, "height": 3}) == {"result": 6} and area(2, 3) == 6
    assert "array expected" in call_tool("area", {"width": 2, "names": "a"})["error"]


def test_a_tool_that_fails_exits_or_says_no_json_is_an_error(own):
    def fails(): raise KeyError("\ud800 gone")
    def leaves(): sys.exit(3)
    def deep(): return deep()
    for function, expected in ((fails, "gone"), (leaves, "SystemExit"), (deep, "recursion")):
        tool(function)
        assert expected in call_tool(function.__name__, {})["error"]
        json.dumps(call_tool(function.__name__, {}), ensure_ascii=False).encode()
    for number, value in enumerate((object(), float("nan"), {"a": {1, 2}}, "\ud800")):
        function = lambda value=value: value  # noqa: E731
        function.__name__ = f"odd_{number}"
        tool(function)
        assert list(call_tool(function.__name__, {})) == ["error"]


def test_a_tool_that_hangs_is_left_behind_also_in_a_thread(own):
    never, results = threading.Event(), []

    @tool(timeout=0.05)
    def hangs():
        never.wait()

    thread = threading.Thread(target=lambda: results.append(call_tool("hangs", {})))
    thread.start()
    thread.join(60)
    never.set()
    assert results == [{"error": "no result within 0.05 s"}]
