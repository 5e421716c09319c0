"""Let a model call tools: interactively, for one --prompt, or scored, on held-out tasks or on a file of cases.

    python eval_toolcall.py --weight agent                                   # every call and result is shown
    python eval_toolcall.py --weight full_sft agent --benchmark 200          # the same tasks and seed for each
    python eval_toolcall.py --weight agent --cases ../shared/data/eval/bfcl_simple.jsonl
    python eval_toolcall.py --backend api --api_base_url http://127.0.0.1:8998/v1 --benchmark 50

A task is right when its episode ends in an answer that claims the ground truth. Tasks come from the sample world's
held-out split, which no training file of it shares; what a tool returns depends only on the call and --seed. Cases are
agent_rl rows, or rows of the Berkeley Function-Calling Leaderboard, with the accepted calls beside them in
{name}_answers.jsonl.
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

from dataset.prompts import Prompt
from eval_llm import Chat, add_chat_args
from model.chat import TOKENIZER_DIR, AssistantMessage, ChatTokenizer, parse_json
from model.cli import SWITCH, Parser, UserError, add_sampling_args, notice, num_positions, run_main, whole_number
from model.files import write_atomically
from model.inference.engine import Engine, SamplingParams
from model.loading import MODEL_SIZES, add_loading_args, load_from_args
from scripts.chat_api import ApiChat
from scripts.lib.openai_client import LOCAL_SERVER, ChatClient, RequestRefused, as_strict
from scripts.lib.terminal import interact
from scripts.lib.tool_cases import Case, held_out_tasks, is_accepted, read_cases
from trainer.rl.agent_rewards import answer_reward
from trainer.rl.episodes import call_grammar, offered_tools, run_calls, run_episodes
from trainer.rl.rewards import NUMBER
from trainer.rl.tools import SCHEMAS, call_offered_tool, call_tool
from trainer.rl.trajectory import Trajectory

MAX_TURNS = 5
MAX_BATCH = 64  # episodes that run at once
API_CONCURRENCY = 8  # requests
RolloutFn = Callable[[list[Prompt], int], list[Trajectory]]  # prompts and the limit of turns → one episode per prompt


# -- episodes ----------------------------------------------------------------------------------------------------------


def local_rollouts(model, tokenizer: ChatTokenizer, args: argparse.Namespace) -> RolloutFn:
    """Episodes of a model in this process; all advance together."""
    max_len = min(args.max_total_len, model.config.max_position_embeddings)

    def rollout(prompts: list[Prompt], max_turns: int) -> list[Trajectory]:
        fitting = [prompt for prompt in prompts if len(prompt.ids) < max_len]
        params = [SamplingParams(args.max_new_tokens, args.temperature, args.top_p, seed=args.seed + number,
                                 grammar=call_grammar(tokenizer, prompt) if args.constrained else None)
                  for number, prompt in enumerate(fitting)]
        engine = Engine(model, max_batch=max(1, min(MAX_BATCH, len(fitting))))
        episodes = iter(run_episodes(engine, fitting, params, tokenizer, max_turns, max_len,
                                     partial(call_tool, seed=args.seed)))
        return [next(episodes) if len(prompt.ids) < max_len else Trajectory(prompt, finish_reason="length")
                for prompt in prompts]
    return rollout


def thinking_body(args: argparse.Namespace) -> dict | None:
    """The field that asks our server to think; strict servers refuse requests with a field they do not know."""
    return {"open_thinking": 1} if args.open_thinking else None


def api_rollouts(client: ChatClient, args: argparse.Namespace) -> RolloutFn:
    """Episodes of a model behind a server, some at a time.

    A refused request, such as one that has become too long for the server, ends its episode.
    """
    def run_episode(prompt: Prompt, max_turns: int, seed: int) -> Trajectory:
        episode, messages, offered = Trajectory(prompt), list(prompt.messages), offered_tools(prompt)
        tools = as_strict(parse_json(prompt.tools, "tools", list)) if args.constrained else None
        while not episode.finish_reason:
            try:
                message, finish_reason = client.complete(
                    messages, tools, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens,
                    seed=seed, extra_body=thinking_body(args))
            except RequestRefused as error:
                refusals.append(error)
                episode.finish_reason = "refused"
                break
            calls = message.get("tool_calls", [])
            episode.answer = AssistantMessage(
                message["content"], message.get("reasoning_content", ""),
                [call for call in calls if isinstance(call["arguments"], dict)],
                [call["arguments"] for call in calls if isinstance(call["arguments"], str)])
            episode.turns.append(episode.answer)
            if finish_reason == "length":
                episode.finish_reason = "length"
            elif not calls:
                episode.finish_reason = "stop"
            elif len(episode.turns) >= max_turns:
                episode.finish_reason = "turns"
            else:
                results = [call_offered_tool(**call, offered=offered, call=partial(call_tool, seed=args.seed))
                           for call in calls]
                episode.calls += zip(calls, results, strict=True)
                messages += [message, *({"role": "tool", "content": json.dumps(result, ensure_ascii=False)}
                                        for result in results)]
        return episode

    def rollout(prompts: list[Prompt], max_turns: int) -> list[Trajectory]:
        with ThreadPoolExecutor(API_CONCURRENCY) as pool:
            seeds = range(args.seed, args.seed + len(prompts))
            episodes = list(pool.map(run_episode, prompts, [max_turns] * len(prompts), seeds))
        if refusals and len(refusals) == len(prompts):
            raise refusals[0]
        if refusals:
            notice(f"{len(refusals)} of {len(prompts)} episodes ended in a refused request: {refusals[0]}")
        refusals.clear()
        return episodes
    refusals: list[RequestRefused] = []
    return rollout


# -- scores ------------------------------------------------------------------------------------------------------------


def evaluate(rollout: RolloutFn, cases: list[Case]) -> dict:
    """Play all cases and print a line for each. → per kind of case: how many are right, of how many, and every case"""
    by_kind = defaultdict(list)
    for case in cases:
        by_kind[case.kind].append(case)
    results = {}
    for kind, kind_cases in by_kind.items():
        calls_only = not kind_cases[0].prompt.ground_truth and kind_cases[0].accepted is not None
        episodes = rollout([case.prompt for case in kind_cases], 1 if calls_only else MAX_TURNS)
        scores = [score_case(case, episode, calls_only) for case, episode in zip(kind_cases, episodes, strict=True)]
        for score in scores:
            print(f"{'✅' if score['right'] else '❌'} {kind}: {score['asked']}  gt {score['gt']}  "
                  f"prediction {score['prediction']}")
        num_right = sum(score["right"] for score in scores)
        low, high = wilson_interval(num_right, len(scores))
        results[kind] = {"right": num_right, "of": len(scores), "rate": num_right / len(scores), "low": low,
                         "high": high, "right_calls": sum(score["right_call"] for score in scores), "cases": scores}
    return results


def score_case(case: Case, episode: Trajectory, calls_only: bool) -> dict:
    """The score of an episode and what explains it, as JSON. `calls_only`: score the first call, not the answer."""
    first = episode.turns[0] if episode.turns else AssistantMessage()
    right_call = (case.accepted is not None and len(first.tool_calls) == 1 and not first.malformed
                  and is_accepted(first.tool_calls[0], case.accepted))
    content, gt = " ".join(episode.answer.content.split()), case.prompt.ground_truth
    if calls_only:
        right, shown_gt = right_call, json.dumps(case.accepted, ensure_ascii=False)
        prediction = json.dumps(first.tool_calls or first.malformed or content, ensure_ascii=False)
    else:
        right, shown_gt = answer_reward(case.prompt, episode) == 1, " ".join(gt)
        numbers = NUMBER.findall(content) if gt and all(map(NUMBER.fullmatch, gt)) else []
        prediction = (f"none ({episode.finish_reason})" if episode.truncated else
                      " ".join(numbers[-len(gt):]) or content or "none")
    return {"asked": " ".join(case.shown.split()), "right_call": right_call, "prediction": prediction, "gt": shown_gt,
            "right": right, "turns": [asdict(turn) for turn in episode.turns],
            "results": [result for _, result in episode.calls]}


def wilson_interval(num_right: int, num_cases: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% confidence interval of a proportion (Wilson 1927)."""
    p, n = num_right / num_cases, num_cases
    center, spread = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (center - spread) / (1 + z * z / n)), min(1.0, (center + spread) / (1 + z * z / n))


# -- the program -------------------------------------------------------------------------------------------------------


class ToolChat(Chat):
    """A conversation with a model in this process; it goes on by itself as long as the model calls tools."""

    def answer(self, text: str) -> None:
        """Print the answer to `text`, every call and every result."""
        self.messages = self.messages or [{"role": "system", "content": "",
                                           "tools": [SCHEMAS[name] for name in self.args.tools]}]
        if self.args.constrained:
            self.grammar = call_grammar(self.tokenizer, Prompt([], self.messages, bool(self.args.open_thinking)))
        answer = super().answer(text)
        for _ in range(MAX_TURNS - 1):
            calls = run_calls(answer, self.args.tools, call_tool)
            if not calls or self.finish_reason != "stop":  # the calls of a turn that was cut off are not run
                return
            for call, result in calls:
                content = json.dumps(result, ensure_ascii=False)
                print(f"[{call['name']} → {content}]")
                self.messages.append({"role": "tool", "content": content})
            answer = self.reply_to_messages()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", nargs="+", default=["full_sft"],
                        help="name of the weights; several to compare them")
    add_loading_args(parser)
    parser.add_argument("--backend", choices=("local", "api"), default="local", help="api: a server answers")
    parser.add_argument("--api_base_url", default=LOCAL_SERVER, help="base URL of the server (%(default)s)")
    parser.add_argument("--api_key", help="if the server wants one")
    parser.add_argument("--model", default="minimind", help="name of the server's model (%(default)s)")
    parser.add_argument("--tools", nargs="+", choices=tuple(SCHEMAS), default=list(SCHEMAS), metavar="TOOL",
                        help=f"tools to offer in a conversation (all: {' '.join(SCHEMAS)})")
    parser.add_argument("--constrained", **SWITCH, default=0, help="constrain tool calls to a grammar of the tools "
                        "(with --backend api: send the tools as strict)")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--benchmark", type=whole_number(1, 100_000), metavar="N",
                        help="score N arithmetic tasks and N tasks for the other tools")
    parser.add_argument("--cases", type=Path, help="score the cases of a file")
    parser.add_argument("--json", type=Path, help="write the scores there, with every turn")
    parser.add_argument("--max_total_len", type=num_positions, default=2048, help="tokens of an episode (%(default)s)")
    add_sampling_args(parser, open_thinking=0, max_new_tokens=512, temperature=0.0, top_p=0.95, seed=42)
    add_chat_args(parser)
    parser.add_aliases(api_model="model", stream=None)
    args = parser.parse_args()
    args.top_k, args.repetition_penalty = 0, 1.0  # which Chat wants
    if len(args.weight) > 1 and (args.backend == "api" or not (args.benchmark or args.cases)):
        raise UserError("several weights are compared with --benchmark N or --cases FILE, and only local ones")
    if args.benchmark or args.cases:
        parser.note_unused(args, ("prompt", "tools", "history", "show_speed", "use_compile"), "in a conversation")
    else:
        parser.note_unused(args, ("json", "max_total_len"), "with --benchmark or --cases")
    if args.backend == "api":
        in_conversation = () if args.benchmark or args.cases else ("history", "show_speed", "use_compile", "tokenizer")
        parser.note_unused(args, ("weight", "load_from", "lora_weight", "save_dir", "device", "inference_rope_scaling",
                                  *MODEL_SIZES, *in_conversation), "with --backend local")
    else:
        parser.note_unused(args, ("api_base_url", "api_key", "model"), "with --backend api")
    return args


def main() -> None:
    args = parse_arguments()
    client = ChatClient(args.api_base_url, args.api_key, args.model, send_reasoning=True)
    if not (args.benchmark or args.cases):
        args.weight, = args.weight
        chat = ToolChat(*load_from_args(args, args.weight), args) if args.backend == "local" else ApiChat(
            client, args.tools, MAX_TURNS, bool(args.constrained), temperature=args.temperature, top_p=args.top_p,
            seed=args.seed, max_tokens=args.max_new_tokens, extra_body=thinking_body(args))
        return chat.answer(args.prompt) if args.prompt else interact(chat)
    results = {}
    for name in [args.model] if args.backend == "api" else args.weight:
        if args.backend == "api":
            tokenizer, rollout = ChatTokenizer(args.tokenizer or TOKENIZER_DIR), api_rollouts(client, args)
        else:
            model, tokenizer = load_from_args(args, name)
            rollout = local_rollouts(model, tokenizer, args)

        def make_prompt(messages: list[dict], gt: tuple | list = (), tokenizer=tokenizer) -> Prompt:
            thinking = bool(args.open_thinking)
            return Prompt(tokenizer.prompt(messages, open_thinking=thinking), messages, thinking, list(gt))

        cases = held_out_tasks(args.benchmark, args.seed, make_prompt) if args.benchmark else []
        if args.cases:
            cases += read_cases(args.cases, tokenizer, make_prompt, args.max_total_len, bool(args.open_thinking))
        results[name] = evaluate(rollout, cases)
    for name, kinds in results.items():
        for kind, score in kinds.items():
            print(f"{name} {kind}: {score['right']}/{score['of']} = {score['rate']:.1%} "
                  f"[{score['low']:.1%}, {score['high']:.1%}]")
    if args.json:
        settings = {key: getattr(args, key) for key in ("seed", "temperature", "top_p", "open_thinking", "constrained",
                                                          "backend")}
        write_atomically(args.json, json.dumps({**settings, "weights": results}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
