"""What a full run took and gained, from the logs of its stages: docs/report/{name}.md, .json and pictures."""

import json
from pathlib import Path

from benchmarks.machine import machine
from model.files import write_atomically
from scripts.draw_curves import draw_curves, read_log

SCORES = {"val_bpb": "bits a byte", "val_accuracy": "pairs right", "val_reward": "reward", "val_loss": "loss"}
PANELS = 3  # in a picture


def measured(log: Path) -> dict:
    """Tokens, useful tokens/s, MFU and peak memory of a stage, its held-out numbers before and after, from its log.

    Speeds are of training alone: without start-up, compilation of the first steps included, validation left out. With
    online RL a step samples, scores and updates: their seconds are means over the rollouts.
    """
    rows = read_log(log)
    steps = [row for row in rows if "tokens_per_s" in row]
    shares = [after["tokens"] - before for after, before in
              zip(steps, [0] + [row["tokens"] for row in steps], strict=False)]
    seconds = [tokens / row["tokens_per_s"] for tokens, row in zip(shares, steps, strict=True)]
    total = sum(seconds)
    found = {"steps": steps[-1]["step"], "tokens": steps[-1]["tokens"], "training_seconds": total,
             "tokens_per_s": sum(shares) / total,
             "mfu": sum(row["mfu"] * of_row for row, of_row in zip(steps, seconds, strict=True)) / total,
             "memory_gb": max(row["memory_gb"] for row in steps)}
    validated = [row for row in rows if any(key in row for key in SCORES)]
    if validated:
        found |= {"before" if row is validated[0] else "after": {key: row[key] for key in row if key[:4] == "val_"}
                  for row in (validated[0], validated[-1])}
    if "rollout_s" in steps[-1]:
        rolled = [row for row in steps if "rollout_s" in row]
        rollout, scoring = (sum(row[key] for row in rolled) / len(rolled) for key in ("rollout_s", "scoring_s"))
        found["seconds_a_step"] = {"rollout": rollout, "scoring": scoring,
                                   "update": total / steps[-1]["step"] - rollout - scoring}
    return found


def write_report(name: str, place: Path, records: dict, folder: Path, price: float) -> None:
    """Write the report of the run in `place`; `price`: yuan for an hour of this machine."""
    stages, logs = {}, []
    for stage, record in records.items():
        stages[stage] = {"done": record["done"], "seconds": record["seconds"], "yuan": record["seconds"] / 3600 * price,
                         "flags": record["flags"], **record.get("found", {})}
        of_stage = sorted((place / "logs").glob(f"{stage}_*.jsonl"), key=lambda path: path.stat().st_mtime)
        if record["done"] and of_stage:
            stages[stage] |= measured(of_stage[-1])
            logs.append(of_stage[-1])
    about, evaluation = machine(), stages.get("evaluation", {})
    total = sum(stage["seconds"] for stage in stages.values())
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# A full run: {name}", "",
             f"{about['date']}, {about['gpu'] or about['cpu']} ({about['cores']} cores), torch {about['torch']}, "
             f"commit {about['commit']}: `{about['command']}`", "",
             f"{total / 3600:.2f} hours in all, {total / 3600 * price:.2f} yuan at {price:g} yuan an hour of this "
             "machine. Wall time counts everything, useful tokens/s the steps alone (with online RL, sampling too); "
             "MFU is of a matrix product measured on this machine.", "",
             "| stage | wall time | tokens | useful tokens/s | MFU | peak memory | held out: before → after | yuan |",
             "|---|---|---|---|---|---|---|---|"]
    for stage, of in stages.items():
        score = next((key for key in SCORES if key in of.get("after", {})), None)
        moved = f"{SCORES[score]} {of['before'][score]:.3f} → **{of['after'][score]:.3f}**" if score else ""
        numbers = [f"{of['tokens']:,}", f"{of['tokens_per_s']:,.0f}", f"{of['mfu']:.0%}",
                   f"{of['memory_gb']:.1f} GB"] if "tokens" in of else [""] * 4
        wall = f"{of['seconds']:.0f} s" if of["seconds"] < 600 else f"{of['seconds'] / 3600:.2f} h"
        lines.append("| " + " | ".join([stage if of["done"] else f"{stage} (not finished)", wall, *numbers, moved,
                                        f"{of['yuan']:.3f}"]) + " |")
    for stage, of in stages.items():
        if parts := of.get("seconds_a_step"):
            lines += ["", f"A step of {stage}: " + ", ".join(f"{key} {value:.2f} s" for key, value in parts.items())]
    if rows := stages.get("data", {}).get("rows"):
        lines += ["", "Rows: " + "; ".join(f"{kind} {of['rows']:,} of {', '.join(of['files'])}"
                                           for kind, of in rows.items()) + ". sample/ is the synthetic sample world."]
    if exam := evaluation.get("exam"):
        skills = list({skill: None for of in exam.values() for skill in of})
        lines += ["", "## Held-out cases of the sample world, answered exactly", "",
                  f"| weight | {' | '.join(skills)} |", "|---" * (len(skills) + 1) + "|"]
        lines += [f"| {weight} | " + " | ".join(f"{of[skill]:.0%}" for skill in skills) + " |"
                  for weight, of in exam.items()]
    if tools := evaluation.get("tools"):
        lines += ["", "Tasks that want tools, right: " + "; ".join(
            f"{weight} " + ", ".join(f"{kind} {right}" for kind, right in of.items()) for weight, of in tools.items())]
    if answers := evaluation.get("answers"):
        lines += ["", "## What it says (greedy)"]
        for question in next(iter(answers.values())):
            lines += ["", f"**{question}**", ""]
            lines += [f"* {weight}: {' '.join(of[question].split())}" for weight, of in answers.items()]
    for number in range(0, len(logs), PANELS):
        picture = folder / f"{name}_{number // PANELS + 1}.png"
        draw_curves(logs[number:number + PANELS], picture)
        lines += ["", f"![curves]({picture.name})"]
    write_atomically(folder / f"{name}.md", "\n".join(lines) + "\n")
    write_atomically(folder / f"{name}.json", json.dumps(
        {"machine": about, "price_per_hour": price, "stages": stages}, indent=1, ensure_ascii=False) + "\n")
    print(f"report: {folder / name}.md ({total / 60:.1f} minutes, {total / 3600 * price:.2f} yuan)")
