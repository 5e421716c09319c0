"""Measure a weight: bits per byte of texts, multiple-choice accuracy, and what a longer context is worth.

    python scripts/eval_benchmark.py --weight full_sft --text book.txt.gz rows.jsonl
    python scripts/eval_benchmark.py --weight full_sft --benchmark ceval ceval/val --benchmark arc ARC-Easy-Test.jsonl
    python scripts/eval_benchmark.py --weight full_sft --long_text book.txt.gz --picture out/long.png

A benchmark is answered by likelihood: nothing is sampled, each option is scored as the text that follows the question.
acc counts where the likeliest option is the right one, acc_norm where it is the likeliest one per character. Prompts,
tokens and scores are lm-eval's (nothing stands before a question, not even <|im_start|>); so are bits per byte.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from itertools import islice, pairwise
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
from torch import nn

from dataset.reader import read_rows, read_text
from model.chat import BOS, ChatTokenizer
from model.cli import Parser, UserError, nonneg_int, num_positions, run_main
from model.files import write_atomically
from model.inference.likelihood import ScoringRequest, log_likelihoods
from model.loading import add_loading_args, load_from_args
from model.model_minimind import MiniMindForCausalLM
from scripts.draw_curves import subplots
from scripts.lib.benchmark_formats import FORMATS, Question, read_questions

NUM_WINDOWS, NUM_PREDICTED = 16, 256  # in a long text: where it is predicted, and for how many tokens each

# -- texts -------------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> list[str]:
    """The documents of a file: the `text` of every row, or all of a plain text."""
    text = read_text(path)
    texts = [text] if text else [row["text"] for _, row in read_rows(path, kind="text")]
    if not texts:
        raise UserError(f"{path}: no text in it")
    return texts


def windows(ids: list[int], length: int) -> list[ScoringRequest]:
    """A document → rows of at most `length` tokens that predict each token once, the first one after <|im_start|>.

    The last row starts early, so that its tokens, too, see as much as fits (lm-eval's rolling windows).
    """
    tokens = [BOS, *ids]
    spans = [(start, min(start + length, len(ids))) for start in range(0, len(ids), length)]
    return [ScoringRequest(tokens[max(0, end - length):start + 1], [tokens[start + 1:end + 1]]) for start, end in spans]


def measure_texts(model: nn.Module, tokenizer: ChatTokenizer, texts: list[str], length: int) -> dict:
    """Perplexity per token, and bits per byte of UTF-8, of all texts; a token sees at most `length` others."""
    documents = tokenizer.encode_texts(texts)
    scores = log_likelihoods(model, [window for ids in documents for window in windows(ids, length)])
    nats, num_tokens = -sum(score for score, in scores), sum(map(len, documents))
    num_bytes = sum(len(text.encode()) for text in texts)
    return {"documents": len(texts), "tokens": num_tokens, "bytes": num_bytes, "max_seq_len": length,
            "perplexity": math.exp(nats / num_tokens), "bits_per_byte": nats / math.log(2) / num_bytes}


def measure_context(model: nn.Module, ids: list[int], lengths: list[int]) -> dict[str, list[float]]:
    """Perplexity of the same tokens of a text, with ever more of it before them: {"plain": [lengths], "yarn": …}.

    They are the last tokens of windows spread over the text. "yarn" is measured only for MiniMind's own class.
    """
    max_length = max(lengths)
    if len(ids) < max_length:
        raise UserError(f"--long_text has {len(ids):,} tokens, fewer than the longest of --lengths, {max_length:,}")
    ends = window_ends(len(ids), max_length)
    requests = [ScoringRequest(ids[end - length:end - NUM_PREDICTED], [ids[end - NUM_PREDICTED:end]])
                for length in lengths for end in ends]
    scalings = {"plain": False, "yarn": True} if isinstance(model, MiniMindForCausalLM) else {"plain": False}
    curves, original = {}, getattr(model.config, "inference_rope_scaling", False)
    for name, model.config.inference_rope_scaling in scalings.items():  # which the model reads in every forward pass
        nats = [-score for score, in log_likelihoods(model, requests)]
        curves[name] = [math.exp(sum(nats[i:i + NUM_WINDOWS]) / NUM_WINDOWS / NUM_PREDICTED)
                        for i in range(0, len(nats), NUM_WINDOWS)]
    model.config.inference_rope_scaling = original
    return curves


def window_ends(num_tokens: int, max_length: int) -> list[int]:
    """Where windows of up to `max_length` tokens end, spread over a text of `num_tokens`."""
    return [max_length + (num_tokens - max_length) * i // (NUM_WINDOWS - 1) for i in range(NUM_WINDOWS)]


def draw_context(lengths: list[int], curves: dict[str, list[float]], path: Path) -> None:
    """The curves as a PNG."""
    figure, axis = subplots(figsize=(6, 4))
    for name, values in curves.items():
        axis.plot(lengths, values, "o-", label={"plain": "as trained", "yarn": "with YaRN"}[name])
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens of the window", ylabel="perplexity of its last tokens", xticks=lengths, xticklabels=lengths)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# -- questions ---------------------------------------------------------------------------------------------------------


def with_examples(questions: list[Question], examples: list[Question], shots: int) -> list[Question]:
    """The same questions, each after the first `shots` answered examples of its subject."""
    by_subject, result = defaultdict(list), []
    for example in examples:
        by_subject[example.subject].append(example)
    for question in questions:
        others = (example for example in by_subject[question.subject] if example != question)  # the files may be one
        chosen = [f"{example.context} {example.options[example.gold]}\n\n" for example in islice(others, shots)]
        if len(chosen) < shots:
            raise UserError(f"--fewshot {shots}: --fewshot_path has {len(chosen)} of subject {question.subject!r}")
        result.append(question._replace(context="".join(chosen) + question.context))
    return result


def encode(tokenizer: ChatTokenizer, question: Question) -> ScoringRequest:
    """Split as lm-eval does: encode the context, and context and option together; what is longer is the option's.

    Spaces that end the context belong to the options; an empty context is <|im_start|>.
    """
    texts = (f"{question.context} {option}" for option in question.options)
    context, *with_option = tokenizer.encode_texts([question.context.rstrip(), *texts])
    return ScoringRequest(context or [BOS], [ids[len(context):] for ids in with_option])


def answer(model: nn.Module, tokenizer: ChatTokenizer, questions: list[Question]) -> list[dict]:
    """For each question: `acc` and `acc_norm` (0 or 1), a guess's chance `random`, `log_p` of the options (nats)."""
    scores, results = log_likelihoods(model, [encode(tokenizer, question) for question in questions]), []
    for question, log_p in zip(questions, scores, strict=True):
        per_character = [value / len(option) for value, option in zip(log_p, question.options, strict=True)]
        results.append({"subject": question.subject, "log_p": log_p, "random": 1 / len(log_p),
                        "acc": float(log_p.index(max(log_p)) == question.gold),
                        "acc_norm": float(per_character.index(max(per_character)) == question.gold)})
    return results


def summarise(results: list[dict]) -> dict:
    """Means over questions, and the standard error of each: the sample's deviation / √n."""
    summary = {"questions": len(results), "random": statistics.mean(result["random"] for result in results)}
    for name in ("acc", "acc_norm"):
        values = [result[name] for result in results]
        summary[name] = statistics.mean(values)
        summary[f"{name}_stderr"] = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return summary


def percent(standard_error: float | None) -> str:
    """A single question has no standard error."""
    return f"{math.nan if standard_error is None else standard_error:.1%}"


# -- the program -------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", default="full_sft", help="name of the weights (%(default)s)")
    add_loading_args(parser)
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                        help="plain text, or rows in any format that dataset/formats.py lists")
    parser.add_argument("--max_seq_len", type=num_positions, default=512,
                        help="tokens in a row of --text (%(default)s)")
    parser.add_argument("--benchmark", nargs=2, action="append", default=[], metavar=("NAME", "FILE"),
                        help=f"{', '.join(FORMATS)}, and its file or folder (.csv, .tsv, .json, .jsonl, .parquet, .gz)")
    parser.add_argument("--fewshot", type=nonneg_int, default=0, help="examples before a question (%(default)s)")
    parser.add_argument("--fewshot_path", type=Path, help="file or folder of the examples, of the benchmark's format")
    parser.add_argument("--long_text", type=Path, metavar="FILE",
                        help="a text to predict with ever more context, with and without YaRN")
    parser.add_argument("--lengths", type=num_positions, nargs="+", default=[512, 1024, 2048, 4096, 8192],
                        help="window lengths for --long_text, in tokens (%(default)s)")
    parser.add_argument("--picture", type=Path, help="of --long_text: the curves, as a PNG")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    if not (args.text or args.benchmark or args.long_text):
        parser.error("nothing to measure: name --text, --benchmark or --long_text")
    if unknown := [name for name, _ in args.benchmark if name not in FORMATS]:
        parser.error(f"--benchmark {unknown[0]}: not one of {', '.join(FORMATS)}")
    if bool(args.fewshot) != bool(args.fewshot_path) or args.fewshot and len(args.benchmark) != 1:
        parser.error("--fewshot and --fewshot_path go together, with one --benchmark")
    if args.picture and args.picture.suffix != ".png":
        parser.error(f"--picture {args.picture}: the curves are written as a PNG, so name a file that ends in .png")
    if min(args.lengths) <= NUM_PREDICTED:
        parser.error(f"--lengths {min(args.lengths)}: must exceed {NUM_PREDICTED}, the tokens predicted in each window")
    if not args.long_text:
        parser.note_unused(args, ("picture", "lengths"), "with --long_text")
    if not args.text:
        parser.note_unused(args, ("max_seq_len",), "with --text")
    return args


def print_row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(*cells: object) -> None:
    print()
    print_row(*cells)
    print("|" + "---|" * len(cells), flush=True)


def main() -> None:
    args = parse_arguments()
    texts = {path: read_texts(path) for path in args.text}  # read all files before anything is measured
    benchmarks = {(name, path): read_questions(name, Path(path)) for name, path in args.benchmark}
    if args.fewshot:
        examples = read_questions(args.benchmark[0][0], args.fewshot_path)
        benchmarks = {key: with_examples(questions, examples, args.fewshot) for key, questions in benchmarks.items()}
    long_text = "\n".join(read_texts(args.long_text)) if args.long_text else ""
    model, tokenizer = load_from_args(args, args.weight, getattr(torch, args.dtype))
    figures = {"weight": args.weight if args.load_from == "model" else args.load_from, "lora": args.lora_weight,
               "dtype": args.dtype, "texts": {}, "benchmarks": {}}
    if texts:
        print_header(f"text, rows of {args.max_seq_len}", "tokens", "bytes", "perplexity per token", "bits per byte")
    for path, documents in texts.items():
        figures["texts"][str(path)] = result = measure_texts(model, tokenizer, documents, args.max_seq_len)
        print_row(path.name, f"{result['tokens']:,}", f"{result['bytes']:,}", f"{result['perplexity']:.2f}",
                  f"{result['bits_per_byte']:.4f}")
    if benchmarks:
        print_header(f"benchmark, {args.fewshot} examples", "questions", "acc", "acc_norm", "guessing")
    for (name, path), questions in benchmarks.items():
        results, by_subject = answer(model, tokenizer, questions), defaultdict(list)
        for result in results:
            by_subject[result["subject"]].append(result)
        subjects = {subject: summarise(rows) for subject, rows in by_subject.items()} if len(by_subject) > 1 else {}
        figures["benchmarks"][f"{name} {path}"] = total = {"fewshot": args.fewshot, **summarise(results)}
        for label, summary in {**subjects, f"**{name}** {Path(path).name}": total}.items():
            print_row(label, f"{summary['questions']:,}",
                      *(f"{summary[metric]:.1%} ± {percent(summary[f'{metric}_stderr'])}"
                        for metric in ("acc", "acc_norm")), f"{summary['random']:.1%}")
        total["subjects"] = subjects
    if long_text:
        ids = tokenizer.encode_text(long_text)
        curves, ends = measure_context(model, ids, args.lengths), window_ends(len(ids), max(args.lengths))
        num_predicted = NUM_PREDICTED + sum(min(NUM_PREDICTED, end - before) for before, end in pairwise(ends))
        figures["context"] = {"text": str(args.long_text), "lengths": args.lengths, "tokens": num_predicted, **curves}
        print_header(f"perplexity of {num_predicted:,} tokens, window of",
                     *(f"{length:,}" for length in args.lengths))
        for name, values in curves.items():
            print_row(name, *(f"{value:.2f}" for value in values))
    if args.json:
        write_atomically(args.json, json.dumps(figures, indent=1, ensure_ascii=False))
    if long_text and args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_context(args.lengths, curves, args.picture)


if __name__ == "__main__":
    run_main(main)
