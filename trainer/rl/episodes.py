"""Episodes: the model calls tools, they run, it reads what they said, until it answers. Many advance together.

Token in, token out: an episode is the ids that were sampled and the ids of what was observed between; nothing is
tokenised again. All episodes share one engine. When a turn of one ends, its tools run and its next turn is queued
while the others go on; the engine still holds the earlier turns, so only the observation is read.

How a turn ends, and what follows:

    tool calls, whole or malformed   each is answered in one `<tool_response>` turn (malformed ones last), then the next
                                     turn; a malformed call, an unknown tool, one that was not offered and wrong
                                     arguments are answered {"error": why}
    an answer, or nothing            the episode is over: "stop"
    cut off (no <|im_end|>)          over: "length"; a call it had begun, or ended, is not run
    calls in the last turn           over: "turns"; they are not run, since nobody would read the results
    no room for results and a token  over: "length"; the results are not appended

With `thinking`, every turn of the episode thinks.
"""

import json
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from dataset.prompts import Prompt
from model.chat import EOS, AssistantMessage, ChatTokenizer, generation_prompt, parse_json, parse_message, render
from model.inference.engine import SamplingParams
from trainer.rl.tools import call_tool
from trainer.rl.trajectory import Trajectory
from trainer.rollout_engine import LocalRolloutEngine

TURN_SEED_STRIDE = 1_000_003  # between the seeds of an episode's turns: far from those of its neighbours


def run_episodes(engine, prompts: list[Prompt], samplings: list[SamplingParams], tokenizer: ChatTokenizer,
                 max_turns: int = 4, max_total_len: int = 2048,
                 call: Callable[[str, dict], dict] = call_tool) -> list[Trajectory]:
    """One episode to each prompt, in the same order.

    `engine` is a LocalRolloutEngine, or anything with its `generate`, which is then asked turn by turn. A turn has at
    most `max_new_tokens` of its sampling, the episode with its prompt `max_total_len` tokens. `call(name, arguments)`
    runs a tool: in training, `partial(call_tool, seed=…)`. Raises ValueError for a prompt that leaves no room.
    """
    episodes = [Trajectory(prompt) for prompt in prompts]
    waiting, running = deque(zip(episodes, samplings, strict=True)), {}
    together = hasattr(engine, "open")
    with engine.open(len(prompts)) if together else nullcontext(BatchedTurns(engine, len(prompts))) as opened:
        limit = min(max_total_len, opened.max_seq_len)

        def ask(episode: Trajectory, sampling: SamplingParams) -> None:
            tokens = episode.tokens
            if len(tokens) >= limit:
                raise ValueError(f"{episode.prompt.source}: a prompt of {len(tokens):,} tokens leaves no room for an "
                                 f"answer within {limit:,}")
            seed = sampling.seed + TURN_SEED_STRIDE * len(episode.turns)
            how = replace(sampling, seed=seed, max_new_tokens=min(sampling.max_new_tokens, limit - len(tokens)))
            running[opened.add(tokens, how)] = episode, sampling

        while waiting or running:
            # no more than the engine holds at once: a later one would take the place of what the earlier ones reuse
            while waiting and len(running) < opened.max_batch:
                ask(*waiting.popleft())
            for sequence in opened.step():
                if sequence.finish_reason is not None:
                    episode, sampling = running.pop(sequence)
                    assert sequence.prompt_ids == episode.tokens, "a turn must go on from the very ids before it"
                    take_turn(episode, sequence, tokenizer, max_turns, limit, call)
                    if not episode.finish_reason:
                        ask(episode, sampling)
    return episodes


@dataclass
class EpisodeEngine:
    """An engine whose answers are episodes with tools, for training: what a tool says depends on `seed` alone."""

    engine: LocalRolloutEngine
    tokenizer: ChatTokenizer
    max_turns: int
    max_total_len: int
    seed: int

    def update(self) -> None:
        self.engine.update()

    def generate(self, prompts: list[Prompt], samplings: list[SamplingParams]) -> list[Trajectory]:
        """One episode to each prompt, in the same order."""
        return run_episodes(self.engine, prompts, samplings, self.tokenizer, self.max_turns, self.max_total_len,
                            partial(call_tool, seed=self.seed))


def take_turn(episode: Trajectory, sequence, tokenizer: ChatTokenizer, max_turns: int, limit: int,
              call: Callable[[str, dict], dict]) -> None:
    """Append what was sampled; run its calls and append what they said, or set `finish_reason`."""
    episode.completion_ids += sequence.completion_ids
    episode.logprobs += sequence.logprobs
    episode.action_mask += [True] * len(sequence.completion_ids)
    episode.answer = parse_message(tokenizer, sequence.completion_ids, episode.prompt.thinking)
    episode.turns.append(episode.answer)
    if sequence.completion_ids[-1:] != [EOS]:
        episode.finish_reason = "length"
    elif not (episode.answer.tool_calls or episode.answer.malformed):
        episode.finish_reason = "stop"
    elif len(episode.turns) >= max_turns:
        episode.finish_reason = "turns"
    else:
        done = run_calls(episode.answer, offered_tools(episode.prompt), call)
        episode.calls += done
        seen = observation(tokenizer, [result for _, result in done], episode.prompt.thinking)
        if len(episode.tokens) + len(seen) >= limit:
            episode.finish_reason = "length"
            return
        episode.completion_ids += seen
        episode.logprobs += [0.0] * len(seen)
        episode.action_mask += [False] * len(seen)


def run_calls(answer: AssistantMessage, offered: list[str],
              call: Callable[[str, dict], dict]) -> list[tuple[dict, dict]]:
    """Run the calls of a turn. → ({"name", "arguments"}, result) of each, malformed ones last and without a name"""
    done = []
    for asked in answer.tool_calls:
        unknown = {"error": f"unknown tool {asked['name']!a:.80}; offered: {', '.join(offered) or 'none'}"}
        done.append((asked, call(**asked) if asked["name"] in offered else unknown))
    wrong = {"error": 'malformed call; write {"name": its name, "arguments": {its arguments}}'}
    return done + [({"name": "", "arguments": {}}, wrong) for _ in answer.malformed]


def offered_tools(prompt: Prompt) -> list[str]:
    """Names of the tools on the first message, which stand there flat or as OpenAI nests them."""
    return [tool.get("function", tool).get("name") for tool in parse_json(prompt.tools, "tools", list)]


def observation(tokenizer: ChatTokenizer, results: list[dict], thinking: bool) -> list[int]:
    """The ids between one turn's `<|im_end|>` and the next turn's first: as the chat format renders these messages."""
    said = [{"role": "tool", "content": json.dumps(result, ensure_ascii=False)} for result in results]
    return tokenizer.encode_segments([[("\n", False), *render(said), *generation_prompt(thinking)]])[0][0]


@dataclass(eq=False)
class TurnRequest:
    """A request to an engine that answers whole batches, in the words of `model.inference.engine.Sequence`."""

    prompt_ids: list[int]
    params: SamplingParams
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class BatchedTurns:
    """`add` and `step` on top of `generate(prompts, samplings)`: a step answers all that were added."""

    max_seq_len = 2**31

    def __init__(self, engine, max_batch: int):
        self.engine, self.max_batch, self._added = engine, max_batch, []

    def add(self, prompt_ids: list[int], params: SamplingParams) -> TurnRequest:
        self._added.append(TurnRequest(prompt_ids, params))
        return self._added[-1]

    def step(self) -> list[TurnRequest]:
        turns, self._added = self._added, []
        answers = self.engine.generate([Prompt(turn.prompt_ids, []) for turn in turns], [turn.params for turn in turns])
        for turn, answer in zip(turns, answers, strict=True):
            turn.completion_ids, turn.logprobs = answer.completion_ids, answer.logprobs
            turn.finish_reason = answer.finish_reason
        return turns
