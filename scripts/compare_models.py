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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import openai

from dataset.lm_dataset import parse_row, read_rows
from eval_llm import QUESTIONS
from model.chat import BOS, parse_message
from model.cli import Failure, Parser, UserError, first_line, nonneg_float, nonneg_int, positive_int, run_main
from model.device import choose_device
from model.inference.engine import Sampling, generate
from model.loading import load_for_inference
from model.weights import OUT_DIR, find_models, save_atomically
from scripts.generate_answers import from_openai, prompt_of, to_openai
from trainer.rl.reward_models import LLMJudge

AT_A_TIME = 4  # requests to an endpoint


def read_prompts(path: Path) -> list[list[dict]]:
    """Conversations that wait for an answer: of rows (.jsonl, their last answers dropped), or one question a line."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file")
    prompts = []
    for number, line in read_rows(path):
        try:
            if ".jsonl" in path.suffixes:
                prompts.append(prompt_of(parse_row(line)))
            elif text := line.decode().strip():
                prompts.append([{"role": "user", "content": text}])
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise UserError(f"{path}: no prompt in it")
    return prompts


def place(spec: str) -> tuple[str, str]:
    """`URL#model` → both. Raises UserError when no model is named."""
    url, _, name = spec.partition("#")
    if not name:
        raise UserError(f"{spec}: no model named; write {url}#NAME")
    return url, name


def endpoint(spec: str, key: str | None, **options) -> Callable[[list[dict]], dict]:
    """`URL#model` → what asks it, messages to message. That raises Failure when the client's retries were in vain."""
    url, name = place(spec)
    client = openai.OpenAI(base_url=url, api_key=key or os.environ.get("OPENAI_API_KEY") or "none", max_retries=4)

    def ask(messages: list[dict]) -> dict:
        told, tools = to_openai(messages)
        with_tools = {"tools": tools} if tools else {}
        try:
            reply = client.chat.completions.create(model=name, messages=told, **options, **with_tools)
            return from_openai(reply.choices[0].message)
        except (openai.OpenAIError, IndexError, TypeError) as error:
            raise Failure(f"{spec}: {first_line(error)}") from None

    return ask


def answers_of(spec: str, prompts: list[list[dict]], args: argparse.Namespace) -> list[dict]:
    """What a model says to each prompt, as messages."""
    if re.match("https?://", spec):
        ask = endpoint(spec, args.api_key, temperature=args.temperature, seed=args.seed, max_tokens=args.max_new_tokens)
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            return list(pool.map(ask, prompts))
    base, _, lora = spec.partition("+")
    found = find_models(args.save_dir).get(base) or {
        "load_from": base if Path(base).is_dir() else "model", "weight": base, "save_dir": args.save_dir}
    model, tokenizer = load_for_inference(**found, tokenizer_dir=args.tokenizer, device=choose_device(args.device),
                                          lora_weight=lora or None)
    if found["load_from"] == "model" and base.startswith("pretrain"):  # it continues text
        ids = [[BOS, *tokenizer.encode_text(prompt[-1]["content"])] for prompt in prompts]
    else:
        ids = [tokenizer.prompt(prompt) for prompt in prompts]
    sampling = Sampling(args.max_new_tokens, args.temperature, seed=args.seed)
    return [parse_message(tokenizer, each.ids).to_dict() for each in generate(model, ids, sampling, tokenizer)]


def cell(text: str) -> str:
    """Any text as one cell of a Markdown table."""
    escaped = re.sub(r"([\\|*_`\[\]])", r"\\\1", text.strip()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"\r?\n", "<br>", escaped) or " "


def markdown(names: list[str], prompts: list[list[dict]], answers: list[list[dict]], grades: list[list[float]]) -> str:
    """One row a prompt, one column a model; a grade stands before the answer it belongs to, the means come last."""
    def shown(answer: dict, score: float | None) -> str:
        parts = [f"({answer['reasoning_content'].strip()})"] if answer.get("reasoning_content") else []
        parts += [answer["content"], *(f"{call['name']} {call['arguments']}" for call in answer.get("tool_calls", ()))]
        return (f"**{score:g}** " if score is not None else "") + cell("\n".join(part for part in parts if part))

    rows = [["prompt", *map(cell, names)], ["---"] * (len(names) + 1)]
    for i, prompt in enumerate(prompts):
        scores = [of_model[i] for of_model in grades] or [None] * len(names)
        rows.append([cell(prompt[-1]["content"]), *map(shown, (of_model[i] for of_model in answers), scores)])
    if grades:
        rows.append(["**mean grade**", *(f"**{statistics.mean(of_model):.2f}**" for of_model in grades)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="MODEL", help="weights, folders, URLs")
    parser.add_argument("--prompts", type=Path, help="lines of text, or .jsonl rows (default: a built-in few)")
    parser.add_argument("--out", type=Path, help="write the Markdown there instead of printing it")
    parser.add_argument("--judge_url", metavar="URL#MODEL", help="an endpoint that grades every answer, 0 to 10")
    parser.add_argument("--api_key", help="of the endpoints (OPENAI_API_KEY, if that is set)")
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="folder of the weights")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, if it is not the one in model/")
    parser.add_argument("--max_new_tokens", type=positive_int, default=256,
                        help="longest answer, in tokens (%(default)s)")
    parser.add_argument("--temperature", type=nonneg_float, default=0.0,
                        help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--seed", type=nonneg_int, default=42, help="of sampling (%(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto: the best there is")
    args = parser.parse_args()
    prompts = read_prompts(args.prompts) if args.prompts else [[{"role": "user", "content": q}] for q in QUESTIONS]
    answers, grades, failure = [answers_of(spec, prompts, args) for spec in args.models], [], None
    if args.judge_url:
        judge = LLMJudge(*place(args.judge_url), args.api_key, AT_A_TIME)
        try:
            grades = [[10 * grade for grade in judge.grade([
                judge.question([*prompt, answer], []) for prompt, answer in zip(prompts, of_model, strict=True)])]
                      for of_model in answers]
        except ValueError as error:
            failure = error  # the answers are worth keeping
    table = markdown(args.models, prompts, answers, grades)
    if args.out:
        save_atomically(table, args.out)
    else:
        print(table, end="")
    if failure:
        raise Failure(f"--judge_url {failure}; the answers are there, without grades")


if __name__ == "__main__":
    run_main(main)
