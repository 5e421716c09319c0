"""Episodes: the model calls tools, they run, it reads their results, until it answers. Many advance together.

Token in, token out: an episode is the ids that were sampled and the ids of the observations between them; nothing is
tokenised again. All episodes share one engine. When a turn of one ends, its tools run and its next turn is queued
while the others go on; the engine still caches the earlier turns, so only the observation is computed.

How a turn ends, and what follows:

    tool calls, valid or malformed    each is answered in one `<tool_response>` turn (malformed ones last), then the
                                      next turn; a malformed call, an unknown tool, one that was not offered and wrong
                                      arguments are answered {"error": why}
    an answer, or nothing             the episode is over: "stop"
    cut off (no <|im_end|>)           over: "length"; its calls, finished or not, are not run
    calls in the last turn            over: "turns"; they are not run, since nobody would read the results
    results and a token do not fit    over: "length"; the results are not appended

With `thinking`, every turn of the episode thinks.
"""

import json
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from dataset.prompts import Prompt
from model.chat import EOS, AssistantMessage, ChatTokenizer, parse_json, parse_message
from model.cli import UserError
from model.inference.constraints import Grammar, chat_grammar
from model.inference.engine import Engine, SamplingParams, Sequence
from trainer.rl.tools import call_offered_tool, call_tool
from trainer.rl.trajectory import Trajectory

TURN_SEED_STRIDE = 1_000_003  # between the seeds of an episode's turns: far from those of its neighbours
CallFn = Callable[[str, dict], dict]  # name, arguments → result


def run_episodes(session: "Engine | BatchedTurns", prompts: list[Prompt], sampling_params: list[SamplingParams],
                 tokenizer: ChatTokenizer, max_turns: int = 4, max_total_len: int = 2048,
                 call: CallFn = call_tool) -> list[Trajectory]:
    """One episode for each prompt, in the same order.

    A turn has at most `max_new_tokens` of its sampling, the episode with its prompt `max_total_len` tokens.
    `call(name, arguments)` runs a tool. Raises ValueError for a prompt that leaves no room for an answer.

    1. Queue first turns, as many as the session runs at once. 2. Step: every turn gets a token. 3. Of each turn that
    ended, run the calls and queue the next one, until its episode ends.
    """
    max_len = min(max_total_len, session.max_seq_len)
    episodes = [Trajectory(prompt) for prompt in prompts]
    waiting, running = deque(zip(episodes, sampling_params, strict=True)), {}

    def queue_turn(episode: Trajectory, sampling: SamplingParams) -> None:
        tokens = episode.tokens
        if len(tokens) >= max_len:
            raise ValueError(f"{episode.prompt.source}: a prompt of {len(tokens):,} tokens leaves no room for an "
                             f"answer within {max_len:,}")
        params = replace(sampling, seed=sampling.seed + TURN_SEED_STRIDE * len(episode.turns),
                         max_new_tokens=min(sampling.max_new_tokens, max_len - len(tokens)))
        running[session.add(tokens, params)] = episode, sampling

    while waiting or running:
        # no more than fit at once: a further one would evict the cache that the running ones reuse in their next turn
        while waiting and len(running) < session.max_batch:
            queue_turn(*waiting.popleft())
        for sequence in session.step():
            if sequence.finish_reason is not None:
                episode, sampling = running.pop(sequence)
                assert sequence.prompt_ids == episode.tokens, "a turn must go on from the very ids before it"
                finish_turn(episode, sequence, tokenizer, max_turns, max_len, call)
                if not episode.finish_reason:
                    queue_turn(episode, sampling)
    return episodes


def finish_turn(episode: Trajectory, sequence: Sequence, tokenizer: ChatTokenizer, max_turns: int, max_len: int,
                call: CallFn) -> None:
    """Append what was sampled; run its calls and append the observation, or set `finish_reason`."""
    ids = sequence.completion_ids
    episode.completion_ids += ids
    episode.logprobs += sequence.logprobs
    episode.action_mask += [True] * len(ids)
    episode.answer = parse_message(tokenizer, ids, episode.prompt.thinking)
    episode.turns.append(episode.answer)
    if ids[-1:] != [EOS]:
        episode.finish_reason = "length"
    elif not (episode.answer.tool_calls or episode.answer.malformed):
        episode.finish_reason = "stop"
    elif len(episode.turns) >= max_turns:
        episode.finish_reason = "turns"
    else:
        calls = run_calls(episode.answer, offered_tools(episode.prompt), call)
        episode.calls += calls
        observed = observation(tokenizer, [result for _, result in calls], episode.prompt.thinking)
        if len(episode.tokens) + len(observed) >= max_len:
            episode.finish_reason = "length"
            return
        episode.completion_ids += observed
        episode.logprobs += [0.0] * len(observed)
        episode.action_mask += [False] * len(observed)


def run_calls(answer: AssistantMessage, offered: list[str], call: CallFn) -> list[tuple[dict, dict]]:
    """Run the calls of a turn. → ({"name", "arguments"}, result) of each, malformed ones last and without a name"""
    results = [(tool_call, call_offered_tool(**tool_call, offered=offered, call=call))
               for tool_call in answer.tool_calls]
    malformed = {"error": 'malformed call; write {"name": its name, "arguments": {its arguments}}'}
    return results + [({"name": "", "arguments": {}}, malformed) for _ in answer.malformed]


def offered_tools(prompt: Prompt) -> list[str]:
    """Names of the tools on the first message, where they may be flat or nested as OpenAI's are."""
    return [tool.get("function", tool).get("name") for tool in parse_json(prompt.tools, "tools", list)]


def call_grammar(tokenizer: ChatTokenizer, prompt: Prompt) -> Grammar | None:
    """Of each turn of an episode: what it calls is a tool on offer, with valid arguments. None: no tools.

    Raises UserError for tools whose schema cannot be kept to.
    """
    tools = parse_json(prompt.tools, "tools", list)
    try:
        return chat_grammar(tokenizer, prompt.thinking, tools=tools) if tools else None
    except ValueError as error:
        raise UserError(f"--constrained 1: {prompt.source}{': ' * bool(prompt.source)}{error}") from None


def observation(tokenizer: ChatTokenizer, results: list[dict], thinking: bool) -> list[int]:
    """The ids between one turn's `<|im_end|>` and the next turn's first: as the chat format renders these messages."""
    messages = [{"role": "tool", "content": json.dumps(result, ensure_ascii=False)} for result in results]
    return tokenizer.observation(messages, thinking)


# -- on which engine ---------------------------------------------------------------------------------------------------


@dataclass
class EpisodeEngine:
    """A rollout engine whose answers are episodes, for training: tool results depend on `seed` and arguments alone."""

    engine: object  # local or remote
    tokenizer: ChatTokenizer
    max_turns: int
    max_total_len: int
    seed: int

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    def update(self) -> None:
        self.engine.update()

    def generate(self, prompts: list[Prompt], sampling_params: list[SamplingParams]) -> list[Trajectory]:
        """One episode for each prompt, in the same order."""
        with open_session(self.engine, len(prompts)) as session:
            return run_episodes(session, prompts, sampling_params, self.tokenizer, self.max_turns, self.max_total_len,
                                partial(call_tool, seed=self.seed))


def open_session(engine, num_requests: int) -> "AbstractContextManager[Engine | BatchedTurns]":
    """What `run_episodes` runs on: the engine of this process, or, for a server, whole batches of turns."""
    is_streaming = hasattr(engine, "open")
    return engine.open(num_requests) if is_streaming else nullcontext(BatchedTurns(engine, num_requests))


class BatchedTurns:
    """`add` and `step` on top of `generate(prompts, sampling_params)`: a step answers all that were added."""

    max_seq_len = 2**31

    def __init__(self, engine, max_batch: int):
        self.engine, self.max_batch, self._added = engine, max_batch, []

    def add(self, prompt_ids: list[int], params: SamplingParams) -> Sequence:
        self._added.append(Sequence(prompt_ids, params, None))
        return self._added[-1]

    def step(self) -> list[Sequence]:
        turns, self._added = self._added, []
        answers = self.engine.generate([Prompt(turn.prompt_ids, []) for turn in turns], [turn.params for turn in turns])
        for turn, answer in zip(turns, answers, strict=True):
            turn.completion_ids, turn.logprobs = answer.completion_ids, answer.logprobs
            turn.finish_reason = answer.finish_reason
        return turns
