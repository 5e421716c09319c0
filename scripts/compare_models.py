"""The same prompts through several models, side by side as Markdown; a model behind a URL may grade the answers.

    python scripts/compare_models.py --models full_sft dpo full_sft+lora_identity --out out/compared.md
    python scripts/compare_models.py --models full_sft http://127.0.0.1:11434/v1#qwen3 --prompts questions.txt \
        --judge_url http://127.0.0.1:11434/v1#qwen3

A model is a weight of --save_dir (`name` or `name_768`, a LoRA behind a plus), a transformers folder, or the URL of an
OpenAI-compatible endpoint with the model's name there behind a #.
"""

import argparse
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from dataset.reader import read_rows, read_text
from eval_llm import QUESTIONS
from model.chat import BOS, parse_message
from model.cli import Failure, Parser, UserError, add_sampling_args, run_main
from model.device import choose_device
from model.files import write_atomically
from model.inference.engine import SamplingParams, generate
from model.loading import add_folder_args, continues_text, load_for_inference
from model.weights import find_models
from scripts.generate_answers import prompt_of
from scripts.lib.openai_client import ChatClient

CONCURRENCY = 4  # requests to an endpoint


def read_prompts(path: Path) -> list[list[dict]]:
    """Conversations that wait for an answer: of rows, their last answers dropped, or one question a line of text."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    text = read_text(path)
    prompts = ([prompt for _, prompt in read_rows(path, prompt_of, kind="prompt")] if text is None else
               [[{"role": "user", "content": line.strip()}] for line in text.splitlines() if line.strip()])
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    return prompts


def split_endpoint(spec: str) -> tuple[str, str]:
    """`URL#model` → both. Raises UserError when no model is named."""
    url, _, name = spec.partition("#")
    if not name:
        raise UserError(f"{spec}: no model named; write {url}#NAME")
    return url, name


def answers_of(spec: str, prompts: list[list[dict]], args: argparse.Namespace) -> list[dict]:
    """A model's answer to each prompt, as messages."""
    if re.match("https?://", spec):
        url, name = split_endpoint(spec)
        complete = partial(ChatClient(url, args.api_key, name, max_retries=4).complete, temperature=args.temperature,
                           seed=args.seed, max_tokens=args.max_new_tokens)
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return [message for message, _ in pool.map(complete, prompts)]
    base, _, lora = spec.partition("+")
    source = find_models(args.save_dir).get(base) or {
        "load_from": base if Path(base).is_dir() else "model", "weight": base, "save_dir": args.save_dir}
    model, tokenizer = load_for_inference(**source, tokenizer_dir=args.tokenizer, device=choose_device(args.device),
                                          lora_weight=lora or None)
    if continues_text(source["load_from"], base):
        prompt_ids = [[BOS, *tokenizer.encode_text(prompt[-1]["content"])] for prompt in prompts]
    else:
        prompt_ids = [tokenizer.prompt(prompt) for prompt in prompts]
    params = SamplingParams(args.max_new_tokens, args.temperature, seed=args.seed)
    return [parse_message(tokenizer, sequence.completion_ids).to_dict()
            for sequence in generate(model, prompt_ids, params, tokenizer)]


def cell(text: str) -> str:
    """Any text as one cell of a Markdown table."""
    escaped = re.sub(r"([\\|*_`\[\]])", r"\\\1", text.strip()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"\r?\n", "<br>", escaped) or " "


def markdown(names: list[str], prompts: list[list[dict]], answers: list[list[dict]], grades: list[list[float]]) -> str:
    """One row per prompt, one column per model; a grade stands before its answer, the means come last."""
    def answer_cell(answer: dict, grade: float | None) -> str:
        parts = [f"({answer['reasoning_content'].strip()})"] if answer.get("reasoning_content") else []
        parts += [answer["content"], *(f"{call['name']} {call['arguments']}" for call in answer.get("tool_calls", ()))]
        return (f"**{grade:g}** " if grade is not None else "") + cell("\n".join(part for part in parts if part))

    rows = [["prompt", *map(cell, names)], ["---"] * (len(names) + 1)]
    for i, prompt in enumerate(prompts):
        row_grades = [model_grades[i] for model_grades in grades] or [None] * len(names)
        row_answers = [model_answers[i] for model_answers in answers]
        rows.append([cell(prompt[-1]["content"]), *map(answer_cell, row_answers, row_grades)])
    if grades:
        rows.append(["**mean grade**", *(f"**{statistics.mean(model_grades):.2f}**" for model_grades in grades)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def make_judge(spec: str, api_key: str | None):
    from trainer.rl.reward_models import LLMJudge  # the only thing here that belongs to training

    return LLMJudge(*split_endpoint(spec), api_key, CONCURRENCY)


def grade(judge, prompts: list[list[dict]], answers: list[list[dict]]) -> list[list[float]]:
    """The grade, 0 to 10, of each model's answer to each prompt. Raises ValueError when the judge gives none."""
    return [[10 * grade for grade in judge.grade([judge.question([*prompt, answer], [])
                                                  for prompt, answer in zip(prompts, model_answers, strict=True)])]
            for model_answers in answers]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="weights, folders, URLs")
    parser.add_argument("--prompts", type=Path, help="a question per line, or conversations (default: built-in ones)")
    parser.add_argument("--out", type=Path, help="write the Markdown there instead of printing it")
    parser.add_argument("--judge_url", metavar="URL#MODEL", help="an endpoint that grades every answer, 0 to 10")
    parser.add_argument("--api_key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    add_folder_args(parser)
    add_sampling_args(parser, max_new_tokens=256, temperature=0.0, seed=42)
    args = parser.parse_args()
    prompts = read_prompts(args.prompts) if args.prompts else [[{"role": "user", "content": q}] for q in QUESTIONS]
    for spec in filter(partial(re.match, "https?://"), args.models):
        split_endpoint(spec)  # whether all are named, before the first one answers
    judge = make_judge(args.judge_url, args.api_key) if args.judge_url else None
    answers, grades, judge_error = [answers_of(spec, prompts, args) for spec in args.models], [], None
    if judge:
        try:
            grades = grade(judge, prompts, answers)
        except ValueError as error:
            judge_error = error  # the answers are worth keeping
    table = markdown(args.models, prompts, answers, grades)
    if args.out:
        write_atomically(args.out, table)
    else:
        print(table, end="")
    if judge_error:
        raise Failure(f"--judge_url {judge_error}; the answers are there, without grades")


if __name__ == "__main__":
    run_main(main)
