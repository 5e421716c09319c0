"""The tokens of one agent episode: what the model wrote is trained, what it only read is not."""

import json

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from model.chat import ChatTokenizer
from trainer.rl.tools import call_tool

PER_ROW = 14
COLORS = {"prompt": "#808891", "written by the model: trained": "#2a9d8f", "observation: read only": "#e76f51"}


def draw() -> Figure:
    """The chat template's own tokens, without the description of the tools; the result is what the tool returns."""
    tokenizer = ChatTokenizer()
    call = {"name": "calculate_math", "arguments": {"expression": "569 + 69 - 96"}}
    result = call_tool(**call)
    ids, mask = tokenizer.encode([
        {"role": "user", "content": "Work out 569 plus 69 minus 96."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result)},
        {"role": "assistant", "content": f"The result is {result['result']}."}])
    ids, mask = ids[:-1], mask[:-1]  # an episode ends with <|im_end|>, without a newline
    prompt, trained, read = COLORS
    kinds = [trained if written else read if True in mask[:number] else prompt for number, written in enumerate(mask)]
    num_rows = -(-len(ids) // PER_ROW)
    figure, axis = plt.subplots(figsize=(9.5, 0.33 * num_rows + 0.5))
    for number, (kind, token) in enumerate(zip(kinds, ids, strict=True)):
        row, column = divmod(number, PER_ROW)
        axis.add_patch(Rectangle((column, -row), 0.94, 0.8, color=COLORS[kind], alpha=0.35, linewidth=0))
        text = tokenizer.decode([token], keep_special_tokens=True).replace("\n", "⏎")
        axis.text(column + 0.47, 0.4 - row, text, ha="center", va="center", fontsize=6.5, parse_math=False)
    for kind, color in COLORS.items():
        axis.add_patch(Rectangle((0, 0), 0, 0, color=color, alpha=0.35, label=kind))
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9)
    axis.set(xlim=(0, PER_ROW), ylim=(1 - num_rows, 1))
    axis.axis("off")
    return figure
