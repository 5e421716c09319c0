"""What an episode with tools earns: the rules of rewards.py for its last answer, and rules for the calls before it.

Each is a component of its own, with weights such that the right answer outweighs the rest together. Attempts to earn
reward without solving the task, and what they earn (tests/test_agent_rewards.py tests each):

    an answer that lists every number         `truth` 0: only the last numbers count, as many as the ground truth has
    the result of another call as the answer  `truth` 0, whatever the calls earn
    no tool, a guess                          `truth` of the guess, `calls` 0
    the same call again and again, or a call  `calls` counts a repeated one against it, and is a share: more valid
      only to have called something           calls earn no more than one
    calls without end                         `calls` at most 1, less than `unfinished` costs; no `truth`, no `form`
    tags without content, or twice            `form` 0: every turn must be well-formed, thinking and answer not empty
    the answer in the thinking only           `truth` 0: only the content counts
"""

from collections import Counter

from dataset.prompts import Prompt, PromptDataset
from trainer.rl.episodes import offered_tools
from trainer.rl.rewards import RewardFn, accuracy, is_well_formed, repetition
from trainer.rl.tools import TOOLS
from trainer.rl.trajectory import Trajectory

AGENT_REWARD_MIX = "truth=1,calls=0.2,form=0.2,unfinished=0.4,repetition=0.2"  # weight of each component


def find_unrewarded(prompts: PromptDataset) -> list[str]:
    """Sentences on prompts that cannot earn what others earn: without ground truth, or with tools that nobody has."""
    num_unknown = sum(not prompt.ground_truth for prompt in prompts.prompts)
    missing_tools = Counter(name for prompt in prompts.prompts for name in offered_tools(prompt) if name not in TOOLS)
    return [f"{num_unknown:,} of {len(prompts):,} prompts have no gt, the values of a right answer: their truth reward "
            "is 0 whatever is answered"] * bool(num_unknown) + [
        f"tool {name!s:.80} of {count:,} prompts is not in trainer/rl/builtin_tools.py: its calls will fail"
        for name, count in missing_tools.most_common(20)]


def answer_reward(prompt: Prompt, episode: Trajectory) -> float:
    """Share of the ground truth in the last answer, 0 to 1; 0 for an episode that did not finish."""
    return 0.0 if episode.truncated else accuracy(prompt, episode)


def call_reward(_: Prompt, episode: Trajectory) -> float:
    """Calls that ran and were new, less the others (malformed, failed or repeated), as a share of all: -1 to 1.

    0 where nothing was called.
    """
    earlier, balance = [], 0
    for call, result in episode.calls:
        balance += -1 if "error" in result or call in earlier else 1
        earlier.append(call)
    return balance / max(len(earlier), 1)


def format_reward(prompt: Prompt, episode: Trajectory) -> float:
    """1 for an episode that ended in an answer with content and whose turns are all well-formed, else 0."""
    well_formed = all(is_well_formed(ids, prompt.thinking, answer)
                      for ids, answer in zip(sampled_turns(episode), episode.turns, strict=True))
    return float(well_formed and not episode.truncated and bool(episode.answer.content.strip()))


def truncation_penalty(_: Prompt, episode: Trajectory) -> float:
    """-1 for an episode that ran out of turns or tokens."""
    return -float(episode.truncated)


def sampled_turns(episode: Trajectory) -> list[list[int]]:
    """The ids that were sampled, turn by turn."""
    turns: list[list[int]] = [[]] if episode.completion_ids else []
    was_sampled = True
    for token, is_sampled in zip(episode.completion_ids, episode.action_mask, strict=True):
        if is_sampled:
            if not was_sampled:
                turns.append([])
            turns[-1].append(token)
        was_sampled = is_sampled
    return turns


AGENT_REWARDS: dict[str, RewardFn] = {"truth": answer_reward, "calls": call_reward, "form": format_reward,
                                      "unfinished": truncation_penalty, "repetition": repetition}
