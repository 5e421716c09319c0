"""Let a model call tools: interactively, for one --prompt, or counted, on held-out tasks or on a file of cases.

    python eval_toolcall.py --weight agent                                   # every call and result is shown
    python eval_toolcall.py --weight full_sft agent --benchmark 200          # the same tasks and seed for each
    python eval_toolcall.py --weight agent --cases ../shared/data/eval/bfcl_simple.jsonl
    python eval_toolcall.py --backend api --api_base_url http://127.0.0.1:8998/v1 --benchmark 50

A task counts when the episode ended in an answer that claims the truth. Tasks come from the sample world's held-out
split, which no training file of it shares; what tools say depends on --seed alone. Cases are agent_rl rows, or function
calling rows of the Berkeley leaderboard, whose accepted calls stand beside them in {name}_answers.jsonl.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path

import openai

from dataset.prompts import Prompt
from eval_llm import Chat, interact
from model.chat import TOKENIZER_DIR, AssistantMessage, ChatTokenizer, read_json
from model.cli import Parser, UserError, fraction, nonneg_float, nonneg_int, positive_int, run_main
from model.inference.engine import Sampling
from model.loading import add_loading_args, load_from_args
from model.weights import save_atomically
from scripts.chat_api import chat, friendly_errors
from scripts.lib.tool_cases import Case, held_out_tasks, is_accepted, read_cases
from trainer.rl.agent_rewards import answer_reward
from trainer.rl.episodes import run_calls, run_episodes
from trainer.rl.rewards import NUMBER
from trainer.rl.tools import SCHEMAS, call_tool
from trainer.rollout_engine import LocalRolloutEngine, Trajectory

MAX_TURNS = 5
API_AT_ONCE = 8  # requests
RolloutFn = Callable[[list[Prompt], int], list[Trajectory]]  # prompts and the most turns → what came of them


# -- who plays ---------------------------------------------------------------------------------------------------------


def local_rollouts(model, tokenizer: ChatTokenizer, args: argparse.Namespace) -> RolloutFn:
    """A model in this process; all episodes advance together."""
    def play(prompts: list[Prompt], max_turns: int) -> list[Trajectory]:
        longest = min(args.max_total_len, model.config.max_position_embeddings)
        fitting = [prompt for prompt in prompts if len(prompt.ids) < longest]
        samplings = [Sampling(args.max_new_tokens, args.temperature, args.top_p, seed=args.seed + number)
                     for number in range(len(fitting))]
        played = iter(run_episodes(LocalRolloutEngine(model, tokenizer), fitting, samplings, tokenizer, max_turns,
                                   longest, partial(call_tool, seed=args.seed)))
        return [next(played) if len(prompt.ids) < longest else Trajectory(prompt, finish_reason="length")
                for prompt in prompts]
    return play


def api_rollouts(client: openai.OpenAI, args: argparse.Namespace) -> RolloutFn:
    """A model behind an OpenAI-compatible server, some episodes at a time."""
    def episode(prompt: Prompt, max_turns: int, seed: int) -> Trajectory:
        played = Trajectory(prompt)
        messages = [{key: value for key, value in message.items() if key != "tools"} for message in prompt.messages
                    if message["role"] != "system" or message["content"]]
        while not played.finish_reason:
            choice = client.chat.completions.create(
                model=args.model, messages=messages, tools=tools_of(prompt), temperature=args.temperature,
                top_p=args.top_p, max_tokens=args.max_new_tokens, seed=seed,
                extra_body={"open_thinking": args.open_thinking}).choices[0]
            asked = choice.message.tool_calls or []
            played.answer = answer_of(choice.message)
            played.turns.append(played.answer)
            if choice.finish_reason == "length":
                played.finish_reason = "length"
            elif not asked:
                played.finish_reason = "stop"
            elif len(played.turns) >= max_turns:
                played.finish_reason = "turns"
            else:
                messages.append(choice.message.model_dump(exclude_none=True))
                for call in asked:
                    result = call_tool(call.function.name, call.function.arguments or "{}", args.seed)
                    played.calls.append((call.function.model_dump(), result))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
        return played

    def play(prompts: list[Prompt], max_turns: int) -> list[Trajectory]:
        with friendly_errors(args.api_base_url), ThreadPoolExecutor(API_AT_ONCE) as pool:
            seeds = range(args.seed, args.seed + len(prompts))
            return list(pool.map(episode, prompts, [max_turns] * len(prompts), seeds))
    return play


def tools_of(prompt: Prompt) -> list[dict]:
    return read_json(prompt.tools) if isinstance(prompt.tools, str) else prompt.tools


def answer_of(message) -> AssistantMessage:
    """A message of the openai SDK, as the chat format takes answers apart."""
    answer = AssistantMessage(message.content or "", getattr(message, "reasoning_content", None) or "")
    for call in message.tool_calls or ():
        try:
            arguments = read_json(call.function.arguments or "{}")
            if not isinstance(arguments, dict):
                raise ValueError("no object")
            answer.tool_calls.append({"name": call.function.name, "arguments": arguments})
        except ValueError:
            answer.malformed.append(call.function.arguments)
    return answer


# -- the count ---------------------------------------------------------------------------------------------------------


def evaluate(play: RolloutFn, cases: list[Case]) -> dict:
    """RolloutFn all cases, print a line on each. → by kind: how many are right, of how many, and every case"""
    by_kind = defaultdict(list)
    for case in cases:
        by_kind[case.kind].append(case)
    results = {}
    for kind, chosen in by_kind.items():
        calls_only = not chosen[0].prompt.ground_truth and chosen[0].accepted is not None
        episodes = play([case.prompt for case in chosen], 1 if calls_only else MAX_TURNS)
        lines = [score_case(case, episode, calls_only) for case, episode in zip(chosen, episodes, strict=True)]
        for line in lines:
            print(f"{'✅' if line['right'] else '❌'} {kind}: {line['asked']}  gt {line['gt']}  "
                  f"prediction {line['prediction']}")
        right = sum(line["right"] for line in lines)
        low, high = wilson(right, len(lines))
        results[kind] = {"right": right, "of": len(lines), "rate": right / len(lines), "low": low, "high": high,
                         "right_calls": sum(line["right_call"] for line in lines), "cases": lines}
    return results


def score_case(case: Case, episode: Trajectory, calls_only: bool) -> dict:
    """What came of a case, in one line of JSON."""
    first = episode.turns[0] if episode.turns else AssistantMessage()
    call_is_right = (case.accepted is not None and len(first.tool_calls) == 1 and not first.malformed
                     and is_accepted(first.tool_calls[0], case.accepted))
    said, gt = " ".join(episode.answer.content.split()), case.prompt.ground_truth
    numbers = NUMBER.findall(said) if gt and all(map(NUMBER.fullmatch, gt)) else []
    prediction = json.dumps(first.tool_calls or first.malformed or said, ensure_ascii=False) if calls_only else (
        f"none ({episode.finish_reason})" if episode.truncated else " ".join(numbers[-len(gt):]) or said or "none")
    return {"asked": " ".join(case.shown.split()), "right_call": call_is_right, "prediction": prediction,
            "gt": json.dumps(case.accepted, ensure_ascii=False) if calls_only else " ".join(gt),
            "right": call_is_right if calls_only else answer_reward(case.prompt, episode) == 1,
            "turns": [asdict(turn) for turn in episode.turns], "results": [result for _, result in episode.calls]}


def wilson(right: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    share_, spread = right / of + z * z / (2 * of), z * sqrt(right * (of - right) / of**3 + z * z / (4 * of * of))
    return max(0.0, (share_ - spread) / (1 + z * z / of)), min(1.0, (share_ + spread) / (1 + z * z / of))


# -- the conversation --------------------------------------------------------------------------------------------------


class ToolChat(Chat):
    """A conversation with a model of ours that goes on by itself as long as tools are called."""

    def answer(self, text: str) -> None:
        tools = [SCHEMAS[name] for name in self.args.tools]
        self.messages = self.messages or [{"role": "system", "content": "", "tools": tools}]
        super().answer(text)
        for _ in range(MAX_TURNS - 1):
            done = run_calls(self.said, self.args.tools, call_tool)
            if not done:
                return
            for call, result in done:
                result = json.dumps(result, ensure_ascii=False)
                print(f"[{call['name']} → {result}]")
                self.messages.append({"role": "tool", "content": result})
            self.reply(self.tokenizer.prompt(self.messages, open_thinking=bool(self.args.open_thinking)))


class ApiChat:
    """The same with a model behind a server."""

    def __init__(self, client: openai.OpenAI, args: argparse.Namespace):
        self.client, self.args, self.messages = client, args, []

    def answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        with friendly_errors(self.args.api_base_url):
            chat(self.client, self.messages, self.args, MAX_TURNS)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", nargs="+", default=["agent"], help="name of the weight; to be counted, of several")
    add_loading_args(parser)
    parser.add_argument("--backend", choices=("local", "api"), default="local", help="api: a server answers")
    parser.add_argument("--api_base_url", default="http://127.0.0.1:8998/v1", help="of the server (%(default)s)")
    parser.add_argument("--api_key", default="none", help="if the server wants one")
    parser.add_argument("--model", default="minimind", help="name of the server's model (%(default)s)")
    parser.add_argument("--tools", nargs="+", choices=tuple(SCHEMAS), default=list(SCHEMAS), metavar="TOOL",
                        help=f"to offer in a conversation (all: {' '.join(SCHEMAS)})")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--benchmark", type=positive_int, metavar="N", help="count N sums and N tasks of other tools")
    parser.add_argument("--cases", type=Path, help="count the cases of a file")
    parser.add_argument("--json", type=Path, help="write what was counted there, with every turn")
    parser.add_argument("--open_thinking", type=int, choices=(0, 1), default=0, help="let the model think first")
    parser.add_argument("--max_new_tokens", type=positive_int, default=256, help="of a turn (%(default)s)")
    parser.add_argument("--max_total_len", type=positive_int, default=2048, help="tokens of an episode (%(default)s)")
    parser.add_argument("--temperature", type=nonneg_float, default=0.0,
                        help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top_p", type=fraction, default=0.95, help="sample from the likeliest tokens (%(default)s)")
    parser.add_argument("--seed", type=nonneg_int, default=42, help="of tasks, tools and sampling (%(default)s)")
    args = parser.parse_args()
    args.top_k, args.repetition_penalty = 0, 1.0
    if len(args.weight) > 1 and not (args.benchmark or args.cases) or len(args.weight) > 1 and args.backend == "api":
        raise UserError("several weights are compared with --benchmark N or --cases FILE, and only local ones")
    return args


def main() -> None:
    args = parse_arguments()
    if args.backend == "api":
        client = openai.OpenAI(base_url=args.api_base_url, api_key=args.api_key)
    if not (args.benchmark or args.cases):
        (args.weight,) = args.weight
        talk = ApiChat(client, args) if args.backend == "api" else ToolChat(*load_from_args(args, args.weight), args)
        return talk.answer(args.prompt) if args.prompt else interact(talk)
    counted = {}
    for weight in [args.model] if args.backend == "api" else args.weight:
        if args.backend == "api":
            tokenizer = ChatTokenizer(args.tokenizer or TOKENIZER_DIR)
            play = api_rollouts(client, args)
        else:
            model, tokenizer = load_from_args(args, weight)
            play = local_rollouts(model, tokenizer, args)

        def prompt_of(messages: list[dict], gt: tuple | list = (), tokenizer=tokenizer) -> Prompt:
            thinks = bool(args.open_thinking)
            return Prompt(tokenizer.prompt(messages, open_thinking=thinks), messages, thinks, list(gt))

        cases = held_out_tasks(args.benchmark, args.seed, prompt_of) if args.benchmark else []
        if args.cases:
            cases += read_cases(args.cases, tokenizer, prompt_of, args.max_total_len, bool(args.open_thinking))
        counted[weight] = evaluate(play, cases)
    for weight, kinds in counted.items():
        for kind, of in kinds.items():
            print(f"{weight} {kind}: {of['right']}/{of['of']} = {of['rate']:.1%} [{of['low']:.1%}, {of['high']:.1%}]")
    if args.json:
        facts = {key: getattr(args, key) for key in ("seed", "temperature", "top_p", "open_thinking", "backend")}
        save_atomically(json.dumps({**facts, "weights": counted}, indent=1, ensure_ascii=False), args.json)


if __name__ == "__main__":
    run_main(main)
