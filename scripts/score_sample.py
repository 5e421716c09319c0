"""Score weights on the sample world's held-out cases: greedy answers, checked exactly."""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from dataset.reader import read_rows
from dataset.sample_world import is_correct
from model.chat import parse_message, render
from model.cli import Parser, UserError, nonneg_int, positive_int, run_main
from model.files import write_atomically
from model.inference.engine import SamplingParams, generate
from model.loading import add_loading_args, load_from_args
from model.weights import ROOT


def score(model, tokenizer, cases: list[dict], max_new_tokens: int = 128) -> list[dict]:
    """Answer each case (a conversation whose last message is the expected one); → the cases with answer and verdict."""
    prompts, thinking = [], []
    for case in cases:
        *context, expected = case["conversations"]
        thinking.append(bool(expected.get("reasoning_content")))
        prompts.append(tokenizer.prompt(context, open_thinking=thinking[-1]))
    answers = generate(model, prompts, SamplingParams(max_new_tokens, temperature=0))
    parsed = [parse_message(tokenizer, answer.completion_ids, thinks).to_dict()
              for answer, thinks in zip(answers, thinking, strict=True)]
    return [case | {"answer": answer, "correct": is_correct(case["conversations"][-1], answer)}
            for case, answer in zip(cases, parsed, strict=True)]


def parse_case(row: dict) -> dict:
    """The row itself. Raises ValueError if it is no case."""
    messages = row.get("conversations")
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(each, dict) for each in messages):
        raise ValueError("a case is a conversation of two messages or more, the last of which is the expected answer")
    render(messages[:-1])  # raises ValueError for what no prompt can be made of
    return row


def share_per_skill(results: list[dict]) -> dict[str, float]:
    """Share of the results that are correct, per skill."""
    by_skill = defaultdict(list)
    for result in results:
        by_skill[result["skill"]].append(result["correct"])
    return {skill: sum(correct) / len(correct) for skill, correct in by_skill.items()}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_path", type=Path, nargs="+", default=[ROOT / "dataset/sample/heldout.jsonl"],
                        help="held-out cases; a row without a skill counts under the name of its file")
    parser.add_argument("--weight", default="full_sft", help="name of the weights")
    add_loading_args(parser)
    parser.add_argument("--max_new_tokens", type=positive_int, default=128, help="longest answer, in tokens")
    parser.add_argument("--json", type=Path, help="write the scores there")
    parser.add_argument("--show_wrong", type=nonneg_int, default=0,
                        help="print up to this many wrong answers per skill")
    args = parser.parse_args()
    cases = [{"skill": path.stem} | row for path in args.data_path for _, row in read_rows(path, parse_case)]
    if not cases:
        raise UserError(f"{args.data_path[0]}: no case in it")
    model, tokenizer = load_from_args(args, args.weight)
    results = score(model, tokenizer, cases, args.max_new_tokens)

    scores, share = share_per_skill(results), sum(result["correct"] for result in results) / len(results)
    summary = ", ".join(f"{skill} {value:.0%}" for skill, value in [*scores.items(), ("all", share)])
    print(f"held-out answers of {args.weight}, exact: {summary}")
    for skill in scores:
        wrong = [result for result in results if result["skill"] == skill and not result["correct"]]
        for result in wrong[:args.show_wrong]:
            *context, expected = result["conversations"]
            print(f"  {skill}: {context[-1]['content']!r}\n    expected {expected}\n    answered {result['answer']}")
    if args.json:
        write_atomically(args.json, json.dumps(scores | {"all": share}, indent=1))


if __name__ == "__main__":
    run_main(main)
