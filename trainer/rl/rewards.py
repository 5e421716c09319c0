"""Trajectories → rewards: rules, reward models and an LLM judge, each a component of its own, summed with weights.

With no flag only the rules score. A rule maps one trajectory to one number, and is written so that, as far as a rule
can tell, the reward is earned only by what it asks for: an answer that lists every number is not a right answer.
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
from model.cli import Failure, UserError, first_line, notice
from model.weights import find_weight
from trainer.rl.reward_models import HFRewardModel, LLMJudge, MiniMindRewardModel
from trainer.rl.trajectory import Trajectory

RewardFn = Callable[[Prompt, Trajectory], float]
BatchRewardFn = Callable[[list[Prompt], list[Trajectory]], Tensor | list[float]]
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)\]])-)?(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?)")
SUPER_AND_SUBSCRIPT_DIGITS = re.compile("[\u00b2\u00b3\u00b9\u2070-\u2099]")
LENGTH_WINDOW = (4, 256)  # tokens of content that are neither too few nor too many
NGRAM = 4  # tokens in a row that count as a repetition when they come again
NUM_SPECIAL = 36  # ids below are special tokens


# -- rules -------------------------------------------------------------------------------------------------------------

def accuracy(prompt: Prompt, trajectory: Trajectory) -> float:
    """Share of the ground truth in the answer, 0 to 1; 0 where none is known. Its numbers must be the answer's last.

    Numbers are compared as numbers; texts are searched without regard to case, width and kind of spaces.
    """
    content = normalize(trajectory.answer.content)
    targets = [normalize(text) for text in prompt.ground_truth]
    num_wanted = sum(len(NUMBER.findall(target)) for target in targets)
    numbers = list(NUMBER.finditer(content))
    last_numbers = numbers[max(0, len(numbers) - num_wanted):] if num_wanted else []
    unmatched = Counter(to_decimal(number.group()) for number in last_numbers)  # each can match one target
    hits = 0
    for target in targets:
        if NUMBER.fullmatch(target):
            hits += unmatched[to_decimal(target)] > 0
            unmatched[to_decimal(target)] -= 1
        else:
            ends = [match.end() for match in re.finditer(word_pattern(target), content)] if target else []
            has_number = NUMBER.search(target)
            hits += bool(ends) and (not has_number or bool(last_numbers) and ends[-1] > last_numbers[0].start())
    return hits / max(len(targets), 1)


def format_ok(prompt: Prompt, trajectory: Trajectory) -> float:
    """1 for an answer that is not cut off, has content or calls, and whose last turn is well-formed; else 0."""
    answer = trajectory.answer
    return float(not trajectory.truncated and bool(answer.content.strip() or answer.tool_calls)
                 and is_well_formed(last_turn(trajectory), prompt.thinking, answer))


def is_well_formed(ids: list[int], thinking: bool, answer: AssistantMessage) -> bool:
    """Whether a turn ends with <|im_end|>, its thinking, if asked for, is closed and not empty, its calls come last,
    closed and parseable, and no other marker occurs. `ids` were sampled, `answer` is parsed from them."""
    *markers, end = [i for i in ids if i < NUM_SPECIAL] or [None]
    if thinking:
        if markers[:1] != [END_THINK] or not answer.reasoning.strip():
            return False
        markers = markers[1:]
    return ids[-1:] == [EOS] == [end] and not answer.malformed and markers == [CALL, END_CALL] * (len(markers) // 2)


def length_reward(tokenizer: ChatTokenizer) -> RewardFn:
    """1 for content of LENGTH_WINDOW tokens; else the ratio to the nearer bound: 0 for none, 1/2 for twice as many."""
    def reward(_: Prompt, trajectory: Trajectory) -> float:
        num_tokens, (low, high) = len(tokenizer.encode_text(trajectory.answer.content)), LENGTH_WINDOW
        return min(1.0, num_tokens / low, high / max(num_tokens, 1))
    return reward


def repetition(_: Prompt, trajectory: Trajectory) -> float:
    """Minus the share of the last turn's NGRAM-grams that occurred before in it, -1 to 0."""
    ids = [i for i in last_turn(trajectory) if i >= NUM_SPECIAL]
    ngrams = [tuple(ids[i:i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def last_turn(trajectory: Trajectory) -> list[int]:
    """The ids that were sampled after the last observation."""
    begin = len(trajectory.completion_ids) - (trajectory.action_mask[::-1] + [False]).index(False)
    return trajectory.completion_ids[begin:]


def normalize(text: str) -> str:
    """One spelling for what reads the same. Superscript and subscript digits are left out: m² does not contain 2."""
    text = SUPER_AND_SUBSCRIPT_DIGITS.sub("", text)
    return " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").casefold().split())


def word_pattern(text: str) -> str:
    """A pattern of `text` that is not part of a longer word or number (Chinese puts nothing between words)."""
    return (r"(?<![0-9a-z])" * bool(re.match(r"[0-9a-z]", text)) + re.escape(text)
            + r"(?![0-9a-z])" * bool(re.search(r"[0-9a-z]$", text)))


def to_decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


# -- all of them -------------------------------------------------------------------------------------------------------

class Rewards:
    """The components in use, `names` [C], and how much each counts, `weights` [C]."""

    def __init__(self, components: dict[str, BatchRewardFn], weights: dict[str, float]):
        self.components, self.names = components, list(components)
        self.weights = torch.tensor([weights.get(name, 1.0) for name in components])

    def score(self, prompts: list[Prompt], trajectories: list[Trajectory]) -> Tensor:
        """The score of each trajectory by each component, unweighted, [n, C] fp32.

        Raises Failure, naming component and row, when one fails or returns a number that is not finite.
        """
        scores = torch.empty(len(prompts), len(self.components))
        for column, (name, component) in enumerate(self.components.items()):
            try:
                scores[:, column] = torch.as_tensor(component(prompts, trajectories), dtype=torch.float32)
            except Exception as error:
                row, error = find_failing_row(component, prompts, trajectories, error)
                raise Failure(f"reward {name} failed on {row}: {first_line(error)}") from error
        if not scores.isfinite().all():
            row, column = (~scores.isfinite()).nonzero()[0].tolist()
            raise Failure(f"reward {self.names[column]} of {prompts[row].source} is {float(scores[row, column])}")
        return scores

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum [n] of `scores` [n, C]."""
        return (scores * self.weights).sum(1)  # a matrix product may round equal rows differently


def find_failing_row(component: BatchRewardFn, prompts: list[Prompt], trajectories: list[Trajectory],
                     error: Exception) -> tuple[str, Exception]:
    """The row that a component fails on when it is given each alone, and the error; all rows, if it is none."""
    for prompt, trajectory in zip(prompts, trajectories, strict=True):
        try:
            component([prompt], [trajectory])
        except Exception as row_error:
            return prompt.source, row_error
    return f"{prompts[0].source} and {len(prompts) - 1} others together", error


def has_weight(*where) -> bool:
    try:
        return bool(find_weight(*where))
    except UserError:
        return False


def batched(reward: RewardFn) -> BatchRewardFn:
    return lambda prompts, trajectories: [reward(*pair) for pair in zip(prompts, trajectories, strict=True)]


def add_reward_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rewards")
    group.add_argument("--reward_mix", default="exact=1,format=0.5,length=0.1,repetition=0.5",
                       help="weight of each component in the sum; 1 for those not listed")
    group.add_argument("--reward_weight", help="add a reward weight of ours, by its name in --save_dir (default: "
                       "'reward', if it is there and no prompt has a gt; 'none': no)")
    group.add_argument("--reward_model_path", help="add a transformers reward model: a folder or a hub name")
    group.add_argument("--trust_remote_code", type=int, choices=(0, 1), default=0,
                       help="allow that model to run its own code")
    group.add_argument("--judge_url", help="add a judge: an OpenAI-compatible endpoint, its key in OPENAI_API_KEY")
    group.add_argument("--judge_model", default="minimind", help="name of the judge's model there")


def make_rewards(args: argparse.Namespace, tokenizer: ChatTokenizer, device: torch.device,
                 rules: dict[str, RewardFn] | None = None, prompts: list[Prompt] | None = None) -> Rewards:
    """The components that the flags ask for: `rules`, and `weight`, `model`, `judge`. Raises UserError.

    Where no flag asks for a model and none of `prompts` has a ground truth, a weight called `reward` is used if there
    is one; else a warning lists the rewards that remain.
    """
    rules = rules or {"exact": accuracy, "format": format_ok, "length": length_reward(tokenizer),
                      "repetition": repetition}
    components = {name: batched(rule) for name, rule in rules.items()}
    has_scorer = args.reward_weight or args.reward_model_path or args.judge_url
    if not has_scorer and prompts and not any(prompt.ground_truth for prompt in prompts):
        if has_weight("reward", args.save_dir, args.hidden_size, args.use_moe):
            args.reward_weight = "reward"
            notice(f"no prompt has a gt: the weight reward of {args.save_dir} scores the answers "
                   "(--reward_weight none: rules only)")
        else:
            notice(f"warning: no prompt has a gt, so only {', '.join(list(rules)[1:])} are learned; add a model with "
                   "--reward_model_path DIR, --judge_url URL, or --reward_weight NAME (trainer/train_reward.py)")
    if args.reward_weight == "none":
        args.reward_weight = None  # one value for it in the resume state
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
