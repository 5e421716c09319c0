"""What a policy sampled: trajectories, and the group of trajectories that answer one prompt."""

from dataclasses import dataclass, field

from torch import Tensor

from dataset.prompts import Prompt
from model.chat import AssistantMessage, ChatTokenizer, parse_message


@dataclass
class Trajectory:
    """What followed a prompt: sampled ids and, in an episode with tools, the observations between them.

    The ids are the very ones that were sampled: nothing is tokenised again.
    """

    prompt: Prompt
    completion_ids: list[int] = field(default_factory=list)  # [T], everything after the prompt
    action_mask: list[bool] = field(default_factory=list)  # [T], sampled by the policy, so trained
    logprobs: list[float] = field(default_factory=list)  # [T], nats, as sampled; 0 for observations
    finish_reason: str = ""  # "stop", "length", or, in an episode, "turns": none were left
    answer: AssistantMessage = field(default_factory=AssistantMessage)  # the last turn, parsed
    turns: list[AssistantMessage] = field(default_factory=list)  # of an episode: every turn, parsed
    calls: list[tuple[dict, dict]] = field(default_factory=list)  # of an episode: {"name", "arguments"} and its result

    @classmethod
    def from_completion(cls, tokenizer: ChatTokenizer, prompt: Prompt, ids: list[int], logprobs: list[float],
                        finish_reason: str) -> "Trajectory":
        """A single answer, sampled in one go."""
        answer = parse_message(tokenizer, ids, prompt.thinking)
        return cls(prompt, ids, [True] * len(ids), logprobs, finish_reason, answer)

    @property
    def tokens(self) -> list[int]:
        return self.prompt.ids + self.completion_ids

    @property
    def truncated(self) -> bool:
        return self.finish_reason != "stop"


@dataclass
class RolloutGroup:
    """The n answers to one prompt and what they earned."""

    prompt_index: int  # in the data set
    trajectories: list[Trajectory]
    scores: Tensor  # [n, components], unweighted
    rewards: Tensor  # [n], the weighted sum of the components

    @property
    def zero_std(self) -> bool:
        """Whether all answers earned the same, so that comparing them teaches nothing."""
        return bool((self.rewards == self.rewards[0]).all())
