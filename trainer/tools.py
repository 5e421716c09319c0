"""The tools a model may call. What can be computed here is; the others are known by name, and somebody else answers."""

import ast
import json
import math
import operator

from dataset.sample_world import TOOLS, tool_schema

SCHEMAS = {name: tool_schema(name) for name in TOOLS}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos}


def calculate_math(expression: str) -> int | float:
    """The value of sums of numbers: + - * / // % and brackets. No powers: nothing short may cost long.

    Raises ValueError when it is anything else.
    """
    def value(node: ast.AST) -> int | float:
        match node:
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=operation, operand=a) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(a))
            case ast.BinOp(left=a, op=operation, right=b) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(a), value(b))
        raise ValueError("only numbers, + - * / // % and brackets")

    try:
        result = value(ast.parse(str(expression).strip()[:500], mode="eval").body)
        if not math.isfinite(result):
            raise ValueError("too large")
        return result
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


RUNNERS = {"calculate_math": calculate_math}


def run_tool(call: dict) -> str | None:
    """The result of {"name", "arguments"} as JSON text; None for a tool that is not computed here."""
    if call["name"] not in RUNNERS:
        return None
    try:
        result = {"result": RUNNERS[call["name"]](**call["arguments"])}
    except (ValueError, TypeError) as error:
        result = {"error": str(error)}
    return json.dumps(result, ensure_ascii=False)
