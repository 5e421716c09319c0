"""Trajectories → rewards: rules, reward models and a judge, each a column of its own, summed with weights.

With no flag the rules alone. A rule looks at one trajectory and returns one number; what it rewards can be had by what
it asks for only, as far as a rule can tell: a list of all numbers is no right answer.
"""

import argparse
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

import torch
from torch import Tensor

from dataset.prompts import Prompt
from model.chat import CALL, END_CALL, END_THINK, EOS, AssistantMessage, ChatTokenizer
from model.cli import Failure, UserError, first_line
from trainer.rl.reward_models import HFRewardModel, LLMJudge, MiniMindRewardModel
from trainer.rl.trajectory import Trajectory

RewardFn = Callable[[Prompt, Trajectory], float]
BatchRewardFn = Callable[[list[Prompt], list[Trajectory]], Tensor | list[float]]
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)\]])-)?(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?)")
LENGTH_WINDOW = (4, 256)  # tokens of content that are neither too few nor too many
REPEATED = 4  # tokens in a row that are a repetition when they come again


# -- rules -------------------------------------------------------------------------------------------------------------

def accuracy(prompt: Prompt, trajectory: Trajectory) -> float:
    """Share of the ground truth in the answer, 0 to 1; 0 where nobody knows it. Its numbers must be the last ones said.

    A number is compared as a number, a text is looked for without regard to case, width and kind of spaces.
    """
    content, wanted = normalize(trajectory.answer.content), [normalize(text) for text in prompt.ground_truth]
    said, count = list(NUMBER.finditer(content)), sum(len(NUMBER.findall(text)) for text in wanted)
    last = said[max(0, len(said) - count):] if count else []
    left = Counter(to_decimal(number.group()) for number in last)  # each can be the answer to one thing asked
    hits = 0
    for text in wanted:
        if NUMBER.fullmatch(text):
            hits += left[to_decimal(text)] > 0
            left[to_decimal(text)] -= 1
        else:
            found = [match.end() for match in re.finditer(word_pattern(text), content)] if text else []
            hits += bool(found) and (not NUMBER.search(text) or bool(last) and found[-1] > last[0].start())
    return hits / max(len(wanted), 1)


def format_ok(prompt: Prompt, trajectory: Trajectory) -> float:
    """1 for an answer that ended by itself, whose thinking (if asked for) is closed and not empty and followed by
    content or calls, with no marker out of place and no call that cannot be read; else 0."""
    answer = trajectory.answer
    return float(not trajectory.truncated and bool(answer.content.strip() or answer.tool_calls)
                 and turn_is_whole(last_turn(trajectory), prompt.thinking, answer))


def turn_is_whole(ids: list[int], thinking: bool, answer: AssistantMessage) -> bool:
    """Whether a turn ended by itself, its thinking, if asked for, is closed and not empty, its calls come last, closed
    and readable, and no marker stands out of place. `ids` were sampled, `answer` is what they say."""
    *markers, end = [i for i in ids if i < 36] or [None]
    if thinking:
        if markers[:1] != [END_THINK] or not answer.reasoning.strip():
            return False
        markers = markers[1:]
    return ids[-1:] == [EOS] == [end] and not answer.malformed and markers == [CALL, END_CALL] * (len(markers) // 2)


def length_rule(tokenizer: ChatTokenizer) -> RewardFn:
    """1 for content of LENGTH_WINDOW tokens; outside, how near it comes as a ratio: 0 for none, 1/2 for twice the most.
    """
    def length(_: Prompt, trajectory: Trajectory) -> float:
        tokens, (low, high) = len(tokenizer.encode_text(trajectory.answer.content)), LENGTH_WINDOW
        return min(1.0, tokens / low, high / max(tokens, 1))
    return length


def repetition(_: Prompt, trajectory: Trajectory) -> float:
    """Minus the share of REPEATED tokens in a row that were said before in this turn, -1 to 0."""
    said = [i for i in last_turn(trajectory) if i > 35]
    runs = [tuple(said[i:i + REPEATED]) for i in range(len(said) - REPEATED + 1)]
    return len(set(runs)) / len(runs) - 1 if runs else 0.0


def last_turn(trajectory: Trajectory) -> list[int]:
    """The ids that were sampled after the last observation."""
    begin = len(trajectory.completion_ids) - (trajectory.action_mask[::-1] + [False]).index(False)
    return trajectory.completion_ids[begin:]


def normalize(text: str) -> str:
    """One spelling for what reads alike."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").casefold().split())


def word_pattern(text: str) -> str:
    """A pattern of `text` that is no part of a longer word or number (Chinese puts nothing between words)."""
    return (r"(?<![0-9a-z])" * bool(re.match(r"[0-9a-z]", text)) + re.escape(text)
            + r"(?![0-9a-z])" * bool(re.search(r"[0-9a-z]$", text)))


def to_decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


# -- all of them -------------------------------------------------------------------------------------------------------

class Rewards:
    """The components that are in use, `names` [C], and how much each counts, `weights` [C]."""

    def __init__(self, components: dict[str, BatchRewardFn], weights: dict[str, float]):
        self.components, self.names = components, list(components)
        self.weights = torch.tensor([weights.get(name, 1.0) for name in components])

    def score(self, prompts: list[Prompt], trajectories: list[Trajectory]) -> Tensor:
        """What each component says of each trajectory, unweighted, [n, C] fp32.

        Raises Failure, naming component and row, when one fails or says something that is no finite number.
        """
        columns = torch.empty(len(prompts), len(self.components))
        for column, (name, component) in enumerate(self.components.items()):
            try:
                columns[:, column] = torch.as_tensor(component(prompts, trajectories), dtype=torch.float32)
            except Exception as error:
                where, error = find_failing_row(component, prompts, trajectories, error)
                raise Failure(f"reward {name} failed on {where}: {first_line(error)}") from error
        if not columns.isfinite().all():
            row, column = (~columns.isfinite()).nonzero()[0].tolist()
            raise Failure(f"reward {self.names[column]} of {prompts[row].source} is {float(columns[row, column])}")
        return columns

    def total(self, components: Tensor) -> Tensor:
        """The weighted sum [n] of `components` [n, C]."""
        return components @ self.weights


def find_failing_row(component: BatchRewardFn, prompts: list[Prompt], trajectories: list[Trajectory],
            error: Exception) -> tuple[str, Exception]:
    """Which row a component fails on when asked about each alone, and how; all, if it is none."""
    for prompt, trajectory in zip(prompts, trajectories, strict=True):
        try:
            component([prompt], [trajectory])
        except Exception as alone:
            return prompt.source, alone
    return f"{prompts[0].source} and {len(prompts) - 1} others together", error


def batched(rule: RewardFn) -> BatchRewardFn:
    return lambda prompts, trajectories: [rule(*pair) for pair in zip(prompts, trajectories, strict=True)]


def add_reward_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rewards")
    group.add_argument("--reward_mix", default="exact=1,format=0.5,length=0.1,repetition=0.5",
                       help="how much each component counts; those not named count 1")
    group.add_argument("--reward_weight", help="add a reward weight of ours, by its name in --save_dir")
    group.add_argument("--reward_model_path", help="add a reward model of transformers': a folder or a hub name")
    group.add_argument("--trust_remote_code", type=int, choices=(0, 1), default=0,
                       help="let that model run the code it brings")
    group.add_argument("--judge_url", help="add a judge: an OpenAI-compatible endpoint, its key in OPENAI_API_KEY")
    group.add_argument("--judge_model", default="minimind", help="name of the judge's model there")


def make_rewards(args: argparse.Namespace, tokenizer: ChatTokenizer, device: torch.device,
                 rules: dict[str, RewardFn] | None = None) -> Rewards:
    """The components that the flags ask for: `rules`, and `weight`, `model`, `judge`. Raises UserError."""
    rules = rules or {"exact": accuracy, "format": format_ok, "length": length_rule(tokenizer),
                      "repetition": repetition}
    components = {name: batched(rule) for name, rule in rules.items()}
    if args.reward_weight:
        components["weight"] = MiniMindRewardModel(args, tokenizer, device)
    if args.reward_model_path:
        components["model"] = HFRewardModel(args.reward_model_path, bool(args.trust_remote_code), device)
    if args.judge_url:
        components["judge"] = LLMJudge(args.judge_url, args.judge_model)
    return Rewards(components, parse_reward_mix(args.reward_mix, components))


def parse_reward_mix(text: str, components: dict[str, BatchRewardFn]) -> dict[str, float]:
    """"exact=1,format=0.5" → numbers by name."""
    mix = {}
    for part in filter(None, text.split(",")):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            mix[name] = float(number)
        except ValueError:
            mix[name] = float("nan")
        if name not in components or not abs(mix[name]) < float("inf"):
            raise UserError(f"--reward_mix {part!r}: write name=number, like exact=1; the components of this run are "
                            f"{', '.join(components)}")
    return mix
