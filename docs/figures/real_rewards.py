"""Online RL on real prompts, 8.3 M parameters on two cores: what the reward model pays for, from the log of the run."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

LOG = Path(__file__).parent / "data/cpu_grpo_256.jsonl"


def draw() -> Figure:
    rows = [row for row in map(json.loads, LOG.read_text("utf-8").splitlines()) if "reward_weight" in row]
    steps = [row["step"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3))
    left.plot(steps, [row["reward_weight"] for row in rows], label="reward model's score")
    left.plot(steps, [row["reward_format"] for row in rows], label="well-formed, share")
    left.set(xlabel="rollout", title="sampled answers", ylim=(-0.25, 0.4))
    left.legend(fontsize=9)
    right.plot(steps, [100 * row["truncated"] for row in rows], color="C3")
    right.set(xlabel="rollout", title="cut off at 96 tokens, %", ylim=(0, 80))
    return figure
