"""Twelve requests of different lengths on four slots: waiting for whole batches, and joining at every step."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from model.inference.engine import Engine, SamplingParams
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

SLOTS = 4
LENGTHS = (6, 30, 12, 9, 24, 5, 8, 18, 7, 28, 10, 6)  # tokens of each answer


def engine_steps() -> list[list[int]]:
    """Of each step of the real engine: which requests got a token."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                               num_key_value_heads=1)).eval()
    engine = Engine(model, max_batch=SLOTS)
    requests = [engine.add([3 + number] * 4, SamplingParams(length, stop_ids=()))
                for number, length in enumerate(LENGTHS)]
    steps = []
    while engine.busy:
        steps.append([requests.index(sequence) for sequence in engine.step()])
    return steps


def static_steps() -> list[list[int]]:
    """The same if a batch is answered until its longest request ends."""
    batches = [range(begin, begin + SLOTS) for begin in range(0, len(LENGTHS), SLOTS)]
    return [[number for number in batch if step < LENGTHS[number]]
            for batch in batches for step in range(max(LENGTHS[number] for number in batch))]


def draw() -> Figure:
    figure, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True)
    panels = (("static batches", static_steps()), ("continuous", engine_steps()))
    for axis, (title, steps) in zip(axes, panels, strict=True):
        rows = [-1] * SLOTS  # which request has which row
        for time, running in enumerate(steps):
            rows = [row if row in running else -1 for row in rows]
            for number in running:
                if number not in rows:
                    rows[rows.index(-1)] = number
            for row, number in enumerate(rows):
                if number >= 0:
                    axis.barh(row, 1, left=time, height=0.85, color=f"C{number % 6}", alpha=0.75, linewidth=0)
        axis.set(yticks=(), ylim=(SLOTS - 0.4, -0.6), title=f"{title}: {len(steps)} steps for {sum(LENGTHS)} tokens")
    axes[1].set_xlabel("step of the model; a colour is a request, a gap an idle slot")
    return figure
