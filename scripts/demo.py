"""From random weights to a model that chats and calls tools, on two CPU cores, in minutes.

Writes the synthetic sample world, trains a small model on it stage by stage with the very scripts of `trainer/`, prints
what each stage gained on held-out cases, draws the loss curves and shows a short chat.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.cli import Parser, run_main
from model.weights import OUT_DIR, ROOT
from scripts.draw_curves import draw_curves, read_log
from scripts.lib.stages import CHAT, HIDDEN_SIZE, SAMPLE, STAGES, Pipeline, Stage, run


def score(stage: Stage) -> dict[str, float]:
    """Share of the held-out cases that the stage's weight answers exactly, per skill and in all."""
    if not stage.answers:
        return {}
    target = OUT_DIR / "logs" / f"{stage.name}_scores.json"
    run("scripts/score_sample.py", {"weight": stage.name, "hidden_size": stage.hidden_size, **(stage.scoring or {}),
                                    "json": target})
    return json.loads(target.read_text("utf-8"))


def show_tool_calls() -> None:
    """What the agent gained with each tool, beside the task of its stage: the totals, not each case."""
    output = run("eval_toolcall.py", {"hidden_size": HIDDEN_SIZE, "weight": ("full_sft", "agent"), "benchmark": 50},
                 show=False)
    print("\n".join(line for line in output.splitlines() if line[:1] not in "✅❌"))


def print_gains(stages: list[Stage], minutes: dict[str, float], scores: dict[str, dict[str, float]]) -> None:
    """What each stage took, the scores after it, and its own validation."""
    skills = list({skill: None for by_skill in scores.values() for skill in by_skill})
    print("\nheld-out cases answered exactly, after each stage (the sample world is synthetic):")
    print(f"{'':12}{'minutes':>9}" + "".join(f"{skill:>{len(skill) + 4}}" for skill in skills))
    for name, by_skill in scores.items():
        cells = [f"{by_skill[skill]:.0%}" if skill in by_skill else "" for skill in skills]
        print(f"{name:13}{minutes[name]:8.1f}" + "".join(
            f"{cell:>{len(skill) + 4}}" for skill, cell in zip(skills, cells, strict=True)))
    print("\nheld-out rows of each stage's own, at its end (online RL: before and after):")
    for stage in stages:
        rows = read_log(stage.log)
        first, last = rows[0], rows[-1]
        print(f"{stage.name:13} " + " ".join(
            f"{name} " + (f"{first[name]:.3f} -> " if first["step"] == 0 else "") + f"{value:.3f}"
            for name, value in last.items() if name.startswith("val_")))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every stage, not only the way to a chatting model")
    args = parser.parse_args()
    stages = [stage for stage in STAGES if args.all or stage.in_demo]
    start, pipeline, scores = time.perf_counter(), Pipeline(OUT_DIR / "demo.json", resume=False), {}
    run("dataset/sample_world.py", {"out": SAMPLE})
    for stage in stages:
        flags = stage.sample_flags | stage.data_flags(SAMPLE)
        pipeline.run(stage.name, flags, partial(run, stage.script, flags))
        scores[stage.name] = score(stage)
    show_tool_calls()
    run("eval_llm.py", {"hidden_size": HIDDEN_SIZE, "temperature": 0, "max_new_tokens": 512, "prompt": CHAT})
    curves = OUT_DIR / "demo.png"
    draw_curves([stage.log for stage in stages], curves)
    minutes = {name: record["seconds"] / 60 for name, record in pipeline.records.items()}
    print_gains(stages, minutes, scores)
    print(f"\nloss curves: {curves.relative_to(ROOT)}   talk to it: .venv/bin/python eval_llm.py"
          f"   ({(time.perf_counter() - start) / 60:.1f} minutes in all)")


if __name__ == "__main__":
    run_main(main)
