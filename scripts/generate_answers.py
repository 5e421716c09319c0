"""Let a model behind any OpenAI-compatible endpoint answer prompts, and keep the answers as rows to fine-tune on.

Distillation from a teacher that shows only its text. Each conversation of --data_path loses its last answer and gets
the teacher's. Run it again to go on where it stopped: prompts that have an answer in --out are skipped.

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

from tqdm import tqdm

from dataset.formats import normalise
from dataset.reader import read_rows
from model.cli import Failure, Parser, UserError, add_sampling_args, first_line, nonneg_int, run_main, whole_number
from scripts.lib.openai_client import ChatClient, RequestRefused, add_endpoint_args


def prompt_of(row: dict) -> list[dict]:
    """The messages of a row of kind "prompt". Raises ValueError when nobody asks anything."""
    prompt = row["conversations"]
    if prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError("the message before the answer is not the user's nor a tool's")
    return prompt


def key_of(prompt: list[dict]) -> str:
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).hexdigest()


def resume(path: Path) -> set[str]:
    """The keys of the answers in `path`; half a line at its end, left by a run that was killed, is cut off."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    complete = data[:data.rfind(b"\n") + 1]
    try:
        done = {json.loads(line)["prompt"] for line in complete.splitlines()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--out {path} holds something other than answers of this program; name another file") from None
    if len(complete) < len(data):
        os.truncate(path, len(complete))
    return done


def pending_prompts(path: Path, done: set[str]) -> Iterator[tuple[str, list[dict]]]:
    """(key, prompt) of every row that is not done, each prompt once. Raises UserError for a bad row."""
    seen = set(done)
    for _, prompt in read_rows(path, prompt_of, kind="prompt"):
        if (key := key_of(prompt)) not in seen:
            seen.add(key)
            yield key, prompt


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True,
                        help="conversations, in any format that dataset/formats.py lists")
    parser.add_argument("--out", type=Path, required=True, help="file that the answered conversations are appended to")
    add_endpoint_args(parser, "OPENAI_API_KEY")
    add_sampling_args(parser, temperature=0.7, max_new_tokens=1024)
    parser.add_argument("--concurrency", type=whole_number(1, 1024), default=8, help="requests at a time")
    parser.add_argument("--limit", type=nonneg_int, default=0, help="answer at most this many prompts (0: all)")
    args = parser.parse_args()
    done = resume(args.out)
    # read to the end before the first request: a bad row in the file costs nothing
    total = len({key for key, _ in pending_prompts(args.data_path, set())} - done)
    prompts = islice(pending_prompts(args.data_path, done), args.limit or None)
    client = ChatClient(args.base_url, args.api_key, args.model, max_retries=4)

    def answer(key: str, prompt: list[dict]) -> dict:
        message, finish_reason = client.complete(prompt, temperature=args.temperature, max_tokens=args.max_new_tokens)
        if finish_reason == "length":  # a half sentence that ends would be learned
            raise ValueError(f"its answer is cut off at --max_new_tokens {args.max_new_tokens}")
        conversation = [*prompt, message]
        normalise({"conversations": conversation}, "chat")  # raises ValueError for one that cannot be learned from
        return {"conversations": conversation, "prompt": key, "teacher": args.model,
                "finish_reason": finish_reason}

    args.out.parent.mkdir(parents=True, exist_ok=True)
    pool, running, rejected = ThreadPoolExecutor(args.concurrency), set(), []
    with open(args.out, "a", encoding="utf-8") as file, \
            tqdm(total=min(total, args.limit or total), unit="answer", disable=None) as progress:
        try:
            while running := running | {pool.submit(answer, *request)
                                        for request in islice(prompts, args.concurrency - len(running))}:
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    try:
                        file.write(json.dumps(future.result(), ensure_ascii=False) + "\n")
                        file.flush()
                    except (RequestRefused, ValueError) as error:  # due to this prompt: go on with the others
                        rejected.append(first_line(error))
                    progress.update()
        except Failure as error:
            raise type(error)(f"{error}; {len(resume(args.out)):,} answers are kept in {args.out}, run again to go on"
                              ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"{len(resume(args.out)):,} answers in {args.out}" + (
        f"; {len(rejected):,} prompts have none, the first because: {rejected[0]}" if rejected else ""))


if __name__ == "__main__":
    run_main(main)
