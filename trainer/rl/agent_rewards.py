"""What an episode with tools earns: the rules of rewards.py for its last answer, and rules for the way there.

Each is a component of its own, with weights such that the right answer outweighs the rest together. What was tried
against them, and what it earns (tests/test_agent_rewards.py holds each):

    an answer that lists every number         `truth` 0: as many numbers count as were asked for, the last ones said
    the result of another call as the answer  `truth` 0, whatever the calls earn
    no tool, a guess                          `truth` of the guess, `calls` 0
    the same call again and again, or a call  `calls` counts a repeated one against it, and is a share: more valid
      to have called something                calls earn no more than one
    calls for ever                            `calls` at most 1, less than `unfinished` takes, no `truth`, no `form`
    tags without content, or twice            `form` 0: every turn must be whole, thinking not empty, the answer too
    the answer in the thinking only           `truth` 0: it looks at the content
"""

from collections.abc import Callable

from dataset.prompts import Prompt
from trainer.rl.rewards import accuracy, repetition, turn_is_whole
from trainer.rl.trajectory import Trajectory

AGENT_REWARD_MIX = "truth=1,calls=0.2,form=0.2,unfinished=0.4,repetition=0.2"  # how much each counts


def answer_reward(prompt: Prompt, episode: Trajectory) -> float:
    """Share of the ground truth that the last answer claims, 0 to 1; 0 for an episode that is not finished."""
    return 0.0 if episode.truncated else accuracy(prompt, episode)


def call_reward(prompt: Prompt, episode: Trajectory) -> float:
    """Calls that ran and were new, less the others (malformed, an error, said before), as a share of all: -1 to 1.

    0 where nothing was called.
    """
    seen, balance = [], 0
    for call, result in episode.calls:
        balance += -1 if "error" in result or call in seen else 1
        seen.append(call)
    return balance / max(len(seen), 1)


def format_reward(prompt: Prompt, episode: Trajectory) -> float:
    """1 for an episode that ended in an answer with content and whose turns are all whole, else 0."""
    whole = all(turn_is_whole(ids, prompt.thinking, answer)
                for ids, answer in zip(sampled_turns(episode), episode.turns, strict=True))
    return float(whole and not episode.truncated and bool(episode.answer.content.strip()))


def sampled_turns(episode: Trajectory) -> list[list[int]]:
    """The ids that were sampled, turn by turn."""
    turns: list[list[int]] = [[]] if episode.completion_ids else []
    for place, (token, sampled) in enumerate(zip(episode.completion_ids, episode.action_mask, strict=True)):
        if sampled:
            if place and not episode.action_mask[place - 1]:
                turns.append([])
            turns[-1].append(token)
    return turns


def truncation_penalty(prompt: Prompt, episode: Trajectory) -> float:
    """-1 for an episode that ran out of turns or tokens."""
    return -float(episode.truncated)


AGENT_REWARDS: dict[str, Callable[[Prompt, Trajectory], float]] = {
    "truth": answer_reward, "calls": call_reward, "form": format_reward, "unfinished": truncation_penalty,
    "repetition": repetition}
