"""Let a model behind any OpenAI-compatible endpoint answer prompts, and keep the answers as rows to fine-tune on.

Distillation from a teacher that shows only its text. Each conversation of --data_path loses its last answer and gets
the teacher's. Run it again to go on where it stopped: what is in --out is not asked again.

    python scripts/generate_answers.py --data_path dataset/rlaif.jsonl --out dataset/sft_teacher.jsonl \
        --base_url http://127.0.0.1:8998/v1 --model minimind
    python trainer/train_full_sft.py --data_path dataset/sft_teacher.jsonl --from_weight pretrain
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import openai
from tqdm import tqdm

from dataset.lm_dataset import parse_conversation, parse_row, read_rows
from model.chat import parse_json, parse_tool_calls
from model.cli import Failure, Parser, UserError, first_line, nonneg_float, nonneg_int, positive_int, run_main


def prompt_of(row: dict) -> list[dict]:
    """The messages before the answer. Raises ValueError when nobody asks anything."""
    messages = parse_conversation(row)
    prompt = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    if not prompt or prompt[-1].get("role") not in ("user", "tool"):
        raise ValueError("the message before the answer is not the user's nor a tool's")
    return prompt


def key_of(prompt: list[dict]) -> str:
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).hexdigest()


def to_openai(prompt: list[dict]) -> tuple[list[dict], list]:
    """Messages of our rows → OpenAI's messages and tools: calls nested and numbered, results pointing at their call."""
    tools = parse_json(prompt[0].get("tools") or [], "tools", list)
    messages, open_calls = [], []
    for number, message in enumerate(prompt):
        told = {"role": message.get("role"), "content": message.get("content") or ""}
        if calls := parse_tool_calls(message):
            told["tool_calls"] = [{"id": f"call_{number}_{i}", "type": "function", "function": {
                "name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for i, call in enumerate(calls)]
            open_calls = [call["id"] for call in told["tool_calls"]]
        elif told["role"] == "tool":
            told["tool_call_id"] = open_calls.pop(0) if open_calls else f"call_{number}"
        messages.append(told)
    return messages, tools


def from_openai(message) -> dict:
    """OpenAI's answer → an assistant message of our rows."""
    answer = {"role": "assistant", "content": message.content or ""}
    if reasoning := getattr(message, "reasoning_content", None):
        answer["reasoning_content"] = reasoning
    if message.tool_calls:
        answer["tool_calls"] = parse_tool_calls({"tool_calls": [call.model_dump() for call in message.tool_calls]})
    return answer


def resume(path: Path) -> set[str]:
    """The keys of what is in `path` already; half a line, left by a run that was killed, is cut off."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    try:
        done = {json.loads(line)["prompt"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--out {path} holds something else than answers of this program; name another file") from None
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return done


def pending_prompts(path: Path, done: set[str]) -> Iterator[tuple[str, list[dict]]]:
    """(key, prompt) of every row that is not done, each prompt once."""
    seen = set(done)
    for number, line in read_rows(path):
        try:
            prompt = prompt_of(parse_row(line))
            key = key_of(prompt)
            to_openai(prompt)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if key not in seen:
            seen.add(key)
            yield key, prompt


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="conversations, .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="the answered conversations, .jsonl; added to")
    parser.add_argument("--base_url", default="http://127.0.0.1:8998/v1", help="of the endpoint (our server's)")
    parser.add_argument("--api_key", help="its key (OPENAI_API_KEY, if that is set)")
    parser.add_argument("--model", default="minimind", help="name of the teacher there")
    parser.add_argument("--temperature", type=nonneg_float, default=0.7, help="of the teacher's sampling")
    parser.add_argument("--max_new_tokens", type=positive_int, default=1024, help="longest answer, in tokens")
    parser.add_argument("--concurrency", type=positive_int, default=8, help="requests at a time")
    parser.add_argument("--limit", type=nonneg_int, default=0, help="answer so many prompts (0: all)")
    args = parser.parse_args()
    done = resume(args.out)
    # read to the end before the first request: a bad row in the file costs nothing
    total = len({key for key, _ in pending_prompts(args.data_path, set())} - done)
    prompts = islice(pending_prompts(args.data_path, done), args.limit or None)
    key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=args.base_url, api_key=key, max_retries=4)

    def ask(key: str, prompt: list[dict]) -> dict:
        messages, tools = to_openai(prompt)
        reply = client.chat.completions.create(
            model=args.model, messages=messages, temperature=args.temperature, max_tokens=args.max_new_tokens,
            **({"tools": tools} if tools else {}))
        return {"conversations": [*prompt, from_openai(reply.choices[0].message)], "prompt": key, "teacher": args.model,
                "finish_reason": reply.choices[0].finish_reason}

    args.out.parent.mkdir(parents=True, exist_ok=True)
    pool, running, refused = ThreadPoolExecutor(args.concurrency), set(), []
    with open(args.out, "a", encoding="utf-8") as file, \
            tqdm(total=min(total, args.limit or total), unit="answer", disable=None) as progress:
        try:
            while running := running | {pool.submit(ask, *each)
                                        for each in islice(prompts, args.concurrency - len(running))}:
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    try:
                        file.write(json.dumps(future.result(), ensure_ascii=False) + "\n")
                        file.flush()
                    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:  # this prompt's fault
                        refused.append(first_line(error))
                    progress.update()
        except openai.OpenAIError as error:
            kept = len(resume(args.out))
            raise Failure(f"{args.base_url}: {first_line(error)}; {kept:,} answers are kept in {args.out}, run again "
                          "to go on") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"{len(resume(args.out)):,} answers in {args.out}" + (
        f"; the endpoint refused {len(refused):,} prompts, the first: {refused[0]}" if refused else ""))


if __name__ == "__main__":
    run_main(main)
