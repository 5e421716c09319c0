"""What a full run took and gained, from the logs of its stages: docs/report/{name}.md, .json and pictures."""

import json
from pathlib import Path

from benchmarks.machine import machine
from model.files import write_atomically
from scripts.draw_curves import draw_curves, read_log
from scripts.eval_benchmark import percent

SCORES = {"val_bpb": "bits per byte", "val_accuracy": "pairs right", "val_reward": "reward", "val_loss": "loss"}
NUM_PANELS = 3  # in a picture


def summarise_log(log: Path) -> dict:
    """Tokens, useful tokens/s, MFU and peak memory of a stage, its held-out numbers before and after, from its log.

    Speeds are of training alone: without start-up, compilation of the first steps included, validation left out. With
    online RL a step samples, scores and updates: their seconds are means over the rollouts.
    """
    rows = read_log(log)
    steps = [row for row in rows if "tokens_per_s" in row]
    tokens = [after["tokens"] - before["tokens"] for before, after in zip([{"tokens": 0}, *steps], steps, strict=False)]
    seconds = [count / row["tokens_per_s"] for count, row in zip(tokens, steps, strict=True)]
    total = sum(seconds)
    summary = {"steps": steps[-1]["step"], "tokens": steps[-1]["tokens"], "training_seconds": total,
               "tokens_per_s": sum(tokens) / total,
               "mfu": sum(row["mfu"] * duration for row, duration in zip(steps, seconds, strict=True)) / total,
               "memory_gb": max(row["memory_gb"] for row in steps)}
    if validated := [row for row in rows if SCORES.keys() & row]:
        summary |= {"before" if row is validated[0] else "after":
                    {key: value for key, value in row.items() if key.startswith("val_")}
                    for row in (validated[0], validated[-1])}
    if rollouts := [row for row in steps if "rollout_s" in row]:
        rollout, scoring = (sum(row[key] for row in rollouts) / len(rollouts) for key in ("rollout_s", "scoring_s"))
        summary["seconds_a_step"] = {"rollout": rollout, "scoring": scoring,
                                     "update": total / steps[-1]["step"] - rollout - scoring}
    return summary


def stage_row(name: str, stage: dict) -> str:
    """A stage in one row of the table."""
    score = next((key for key in SCORES if key in stage.get("after", {})), None)
    gain = f"{SCORES[score]} {stage['before'][score]:.3f} → **{stage['after'][score]:.3f}**" if score else ""
    numbers = [f"{stage['tokens']:,}", f"{stage['tokens_per_s']:,.0f}", f"{stage['mfu']:.0%}",
               f"{stage['memory_gb']:.1f} GB"] if "tokens" in stage else [""] * 4
    wall = f"{stage['seconds']:.0f} s" if stage["seconds"] < 600 else f"{stage['seconds'] / 3600:.2f} h"
    return "| " + " | ".join([name if stage["done"] else f"{name} (not finished)", wall, *numbers, gain,
                              f"{stage['yuan']:.3f}"]) + " |"


def write_report(name: str, run_folder: Path, records: dict, folder: Path, price: float) -> None:
    """Write the report of the run in `run_folder` to `folder`; `price`: yuan for an hour of this machine."""
    stages, logs = {}, []
    for stage, record in records.items():
        stages[stage] = {"done": record["done"], "seconds": record["seconds"], "yuan": record["seconds"] / 3600 * price,
                         "flags": record["flags"], **record.get("found", {})}
        stage_logs = sorted((run_folder / "logs").glob(f"{stage}_*.jsonl"), key=lambda path: path.stat().st_mtime)
        if record["done"] and stage_logs:
            stages[stage] |= summarise_log(stage_logs[-1])
            logs.append(stage_logs[-1])
    about, evaluation = machine(), stages.get("evaluation", {})
    total = sum(stage["seconds"] for stage in stages.values())
    lines = [f"# A full run: {name}", "",
             f"{about['date']}, {about['gpu'] or about['cpu']} ({about['cores']} cores), torch {about['torch']}, "
             f"commit {about['commit']}: `{about['command']}`", "",
             f"{total / 3600:.2f} hours in all, {total / 3600 * price:.2f} yuan at {price:g} yuan per hour of this "
             "machine. Wall time counts everything, useful tokens/s the steps alone (with online RL, sampling too); "
             "MFU is of a matrix product measured on this machine.", "",
             "| stage | wall time | tokens | useful tokens/s | MFU | peak memory | held out: before → after | yuan |",
             "|---|---|---|---|---|---|---|---|", *(stage_row(stage, facts) for stage, facts in stages.items())]
    for stage, facts in stages.items():
        if parts := facts.get("seconds_a_step"):
            lines += ["", f"A step of {stage}: " + ", ".join(f"{key} {value:.2f} s" for key, value in parts.items())]
    if sources := stages.get("data", {}).get("rows"):
        lines += ["", "Rows: " + "; ".join(f"{kind} {source['rows']:,} of {', '.join(source['files'])}" for kind, source
                                           in sources.items()) + ". sample/ is the synthetic sample world."]
    if exam := evaluation.get("exam"):
        skills = list({skill: None for shares in exam.values() for skill in shares})
        lines += ["", "## Held-out cases of the sample world, answered exactly", "",
                  f"| weight | {' | '.join(skills)} |", "|---" * (len(skills) + 1) + "|"]
        lines += [f"| {weight} | " + " | ".join(f"{shares[skill]:.0%}" for skill in skills) + " |"
                  for weight, shares in exam.items()]
    if bits := evaluation.get("bits_per_byte"):
        languages = list(next(iter(bits.values())))
        lines += ["", "## Held-out text, bits per byte", "", f"| weight | {' | '.join(languages)} |",
                  "|---" * (len(languages) + 1) + "|"]
        lines += [f"| {weight} | " + " | ".join(f"{value:.4f}" for value in values.values()) + " |"
                  for weight, values in bits.items()]
    if (benchmarks := evaluation.get("benchmarks")) and (names := list(next(iter(benchmarks.values())))):
        guesses = next(iter(benchmarks.values()))
        lines += ["", "## Benchmarks, no examples: acc ± one standard error (acc_norm)", "",
                  f"| weight | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {weight} | " + " | ".join(
            f"{row['acc']:.1%} ± {percent(row['acc_stderr'])} ({row['acc_norm']:.1%})" for row in rows.values())
            + " |" for weight, rows in benchmarks.items()]
        lines += ["| guessing | " + " | ".join(f"{row['random']:.1%}" for row in guesses.values()) + " |"]
    if context := evaluation.get("context"):
        curves = {"as trained": context["plain"], "with YaRN": context["yarn"]}
        lines += ["", "## Perplexity of the same tokens of a novel, with ever more context (full_sft)", "",
                  f"| tokens of the window | {' | '.join(f'{length:,}' for length in context['lengths'])} |",
                  "|---" * (len(context["lengths"]) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(f"{value:,.1f}" for value in values) + " |"
                  for name, values in curves.items()]
    if tools := evaluation.get("tools"):
        lines += ["", "Tasks that need tools, right: " + "; ".join(f"{weight} " + ", ".join(
            f"{kind} {right}" for kind, right in kinds.items()) for weight, kinds in tools.items())]
    for kind, title in (("answers", "greedy"), ("sampled", "temperature 0.85, top-p 0.95")):
        if answers := evaluation.get(kind):
            lines += ["", f"## Answers ({title})"]
            for question in next(iter(answers.values())):
                lines += ["", f"**{question}**", ""]
                lines += [f"* {weight}: {' '.join(texts[question].split())}" for weight, texts in answers.items()]
    for number in range(0, len(logs), NUM_PANELS):
        picture = folder / f"{name}_{number // NUM_PANELS + 1}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(logs[number:number + NUM_PANELS], picture)
        lines += ["", f"![curves]({picture.name})"]
    write_atomically(folder / f"{name}.md", "\n".join(lines) + "\n")
    write_atomically(folder / f"{name}.json", json.dumps(
        {"machine": about, "price_per_hour": price, "stages": stages}, indent=1, ensure_ascii=False) + "\n")
    print(f"report: {folder / name}.md ({total / 60:.1f} minutes, {total / 3600 * price:.2f} yuan)")
