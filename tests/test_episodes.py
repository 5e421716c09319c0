"""Episodes with tools, sampled by a model that has memorised conversations: what is in a trajectory, how it ends."""

import json
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lab import TOKENIZER, small_model
from reciter import Reciter

from dataset.prompts import Prompt
from model.chat import CALL, END_CALL, EOS, PAD, generation_prompt, render
from model.inference.engine import SamplingParams
from trainer.rl.episodes import observation, open_session, run_episodes
from trainer.rl.tools import SCHEMAS, call_tool
from trainer.rl.trajectory import Trajectory
from trainer.rollout_engine import LocalRolloutEngine

OFFER = {"role": "system", "content": "", "tools": [SCHEMAS["calculate_math"], SCHEMAS["text_length"]]}
GREEDY = SamplingParams(128, temperature=0)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def calls(*pairs: tuple, **more) -> dict:
    tool_calls = [{"name": name, "arguments": arguments} for name, arguments in pairs]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls, **more}


def returns(*results: dict) -> list[dict]:
    return [{"role": "tool", "content": json.dumps(result)} for result in results]


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


SUM, PRODUCT = ("calculate_math", {"expression": "1 + 2"}), ("calculate_math", {"expression": "4 * 5"})
CANONICAL = {  # conversations that an episode must follow id by id
    "plain": [user("hello"), says("Hi.")],
    "one": [user("sum"), calls(SUM), *returns({"result": "3"}), says("It is 3.")],
    "in turn": [user("both"), calls(SUM), *returns({"result": "3"}), calls(PRODUCT), *returns({"result": "20"}),
                says("3, 20.")],
    "at once": [user("pair"), calls(SUM, PRODUCT), *returns({"result": "3"}, {"result": "20"}), says("Now 3 and 20.")],
    "wrong": [user("wrong"), calls(("text_length", {"words": "a"})), *returns(call_tool("text_length", {"words": "a"})),
              says("Sorry.")],
    "thinking": [user("deep"), calls(SUM, reasoning_content="Add."), *returns({"result": "3"}),
                 says("Now: 3.", reasoning_content="Done.")],
}
UNOFFERED = {"error": "unknown tool 'random_number'; offered: calculate_math, text_length"}


def spoken(text: str, *answers: tuple[list[int], list[dict]]) -> tuple[list[int], list[bool]]:
    """Ids and mask of a conversation whose turns the chat format cannot write: raw ids, and the results after each."""
    ids = TOKENIZER.prompt([OFFER, user(text)])
    mask = [False] * len(ids)
    for turn, results in answers:
        observed = observation(TOKENIZER, results, False) if results else []
        ids, mask = ids + turn + observed, mask + [True] * len(turn) + [False] * len(observed)
    return ids, mask


BROKEN = [CALL, *TOKENIZER.encode_text("\n{nothing\n"), END_CALL, EOS]
OPEN = [CALL, *TOKENIZER.encode_text('\n{"name": "calculate_math"'), EOS]
MALFORMED = [{"error": 'malformed call; write {"name": its name, "arguments": {its arguments}}'}]
FINE = [*TOKENIZER.encode_text("Fine."), EOS]
RAW = {
    "malformed": spoken("broken", (BROKEN, MALFORMED), (FINE, [])),
    "open": spoken("open", (OPEN, MALFORMED), (FINE, [])),
    "unknown": TOKENIZER.encode([OFFER, user("dice"), calls(("random_number", {})), *returns(UNOFFERED), says("No.")]),
    "empty": spoken("empty", ([EOS], [])),
    "padded": spoken("padded", ([*TOKENIZER.encode_text("Well"), PAD], [])),
}


@pytest.fixture
def engine() -> LocalRolloutEngine:
    rows = [TOKENIZER.encode([OFFER, *talk])[0] for talk in CANONICAL.values()] + [ids for ids, _ in RAW.values()]
    return LocalRolloutEngine(Reciter(rows), TOKENIZER)


def prompt(text: str, thinking: bool = False) -> Prompt:
    messages = [OFFER, user(text)]
    return Prompt(TOKENIZER.prompt(messages, open_thinking=thinking), messages, thinking)


def run(engine, prompts: list[Prompt], samplings: list[SamplingParams], **options) -> list[Trajectory]:
    with open_session(engine, len(prompts)) as session:
        return run_episodes(session, prompts, samplings, TOKENIZER, **options)


def play(engine, *texts: str, thinking: bool = False, sampling: SamplingParams = GREEDY, **options) -> list[Trajectory]:
    prompts = [prompt(text, thinking) for text in texts]
    return run(engine, prompts, [sampling] * len(prompts), **options)


# -- what is in a trajectory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANONICAL)
@pytest.mark.parametrize("kind", ["together", "turn by turn"])
def test_a_canonical_episode_has_the_ids_of_the_whole_conversation(engine, name, kind):
    talk, other = CANONICAL[name], SimpleNamespace(generate=engine.generate)
    episode, = play(engine if kind == "together" else other, talk[0]["content"], thinking=name == "thinking")
    ids, mask = TOKENIZER.encode([OFFER, *talk])
    assert episode.tokens == ids[:-1]  # which ends in "\n"
    if name != "thinking":  # a prompt that opens the thinking gives `<think>\n`
        assert [False] * len(episode.prompt.ids) + episode.action_mask == mask[:-1]
    assert episode.finish_reason == "stop" and not episode.truncated
    assert len(episode.turns) == sum(message["role"] == "assistant" for message in talk)
    assert [turn.to_dict() for turn in episode.turns] == [
        message for message in talk if message["role"] == "assistant"]
    assert [json.dumps(result) for _, result in episode.calls] == [
        message["content"] for message in talk if message["role"] == "tool"]


def test_log_probabilities_are_those_of_the_whole_distribution():
    model = small_model().eval().requires_grad_(False)
    engine = LocalRolloutEngine(model, TOKENIZER)
    episode, = run(engine, [prompt("sum")], [SamplingParams(20, 1.0, top_p=1.0)])
    logits = model(torch.tensor([episode.tokens])).logits[0].log_softmax(-1)
    start = len(episode.prompt.ids)
    assert episode.logprobs == pytest.approx(
        [float(logits[start + place - 1, token]) for place, token in enumerate(episode.completion_ids)], abs=1e-4)


def test_every_sampled_token_is_marked_and_no_observed_one(engine):
    episode, = play(engine, "both")
    assert len(episode.completion_ids) == len(episode.action_mask) == len(episode.logprobs)
    trained = [token for token, sampled in zip(episode.completion_ids, episode.action_mask, strict=True) if sampled]
    assert trained.count(EOS) == 3 == len(episode.turns)
    assert all(logprob == 0 for logprob, drawn in zip(episode.logprobs, episode.action_mask, strict=True) if not drawn)


@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_episodes_advance_together_and_read_nothing_twice(engine, max_batch):
    texts = ["both", "hello", "pair", "wrong", "sum", "dice"] * 2
    alone = [play(engine, text)[0].completion_ids for text in texts]
    engine.model.read, engine.max_batch = 0, max_batch
    together = play(engine, *texts)
    assert [episode.completion_ids for episode in together] == alone
    # all ids but the last are read once; prompts of another episode, or what they have in common, not even that
    once = sum(len(episode.tokens) - 1 for episode in together)
    assert engine.model.read < once - 0.7 * (len(texts) - 1) * len(together[0].prompt.ids)


def test_sampled_episodes_depend_on_their_own_seed_alone(engine):
    engine.model.sure = 5.0
    wild = [SamplingParams(12, 1.0, top_p=1.0, seed=seed) for seed in (1, 2, 1)]
    prompts = [prompt("sum")] * 3
    one, two, three = run(engine, prompts, wild)
    assert one.completion_ids == three.completion_ids != two.completion_ids
    assert run(engine, prompts[:1], wild[1:2])[0].completion_ids == two.completion_ids


def test_each_turn_draws_with_a_seed_of_its_own(engine):
    engine.generate = mock.Mock(side_effect=engine.generate)
    play(SimpleNamespace(generate=engine.generate), "both")
    seeds = [call.args[1][0].seed for call in engine.generate.call_args_list]
    assert len(set(seeds)) == 3 and seeds[0] == GREEDY.seed


def test_the_model_is_left_as_it_was(engine):
    engine.model.train()
    play(engine, "sum")
    assert engine.model.training and torch.is_grad_enabled()


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, results", [
    ("malformed", "broken", MALFORMED), ("open", "open", MALFORMED), ("unknown", "dice", [UNOFFERED])])
def test_a_call_that_cannot_run_is_answered_with_an_error_and_the_episode_goes_on(engine, name, text, results):
    episode, = play(engine, text)
    assert episode.tokens == RAW[name][0][:len(episode.tokens)] and episode.finish_reason == "stop"
    assert [result for _, result in episode.calls] == results and len(episode.turns) == 2
    assert bool(episode.turns[0].malformed) == (name != "unknown")


def test_an_empty_answer_is_an_answer(engine):
    episode, = play(engine, "empty")
    assert episode.completion_ids == [EOS] and episode.finish_reason == "stop" and not episode.answer.content


def test_an_answer_that_ends_without_its_end_token_is_unfinished(engine):
    episode, = play(engine, "padded")
    assert episode.completion_ids[-1] == PAD and episode.truncated


def test_a_call_that_is_cut_off_ends_the_episode(engine):
    for most in (3, len(TOKENIZER.encode([OFFER, *CANONICAL["one"][:2]])[0]) - len(prompt("sum").ids) - 2):
        episode, = play(engine, "sum", sampling=SamplingParams(most, temperature=0))
        assert len(episode.completion_ids) == most and all(episode.action_mask) and not episode.calls
        assert episode.finish_reason == "length" and episode.truncated


def test_calls_in_the_last_turn_are_not_run(engine):
    ran = []
    episode, = play(engine, "both", max_turns=2, call=lambda name, arguments: ran.append(name) or {"result": "3"})
    assert episode.finish_reason == "turns" and episode.truncated
    assert len(ran) == len(episode.calls) == 1 and len(episode.turns) == 2 and episode.completion_ids[-1] == EOS


def test_an_episode_never_grows_beyond_its_length(engine):
    whole, = play(engine, "sum")
    ends = set()
    for limit in range(len(whole.prompt.ids) + 1, len(whole.tokens) + 2):
        episode, = play(engine, "sum", max_total_len=limit)
        assert len(episode.tokens) <= limit and episode.tokens == whole.tokens[:len(episode.tokens)]
        assert episode.truncated == (len(episode.tokens) < len(whole.tokens))
        assert episode.action_mask[-1]  # an observation that leaves no room for a token is not appended
        ends.add(episode.finish_reason)
    assert ends == {"length", "stop"}
    with pytest.raises(ValueError, match="no room"):
        play(engine, "sum", max_total_len=len(whole.prompt.ids))


def test_a_result_that_is_too_long_ends_the_episode(engine):
    episode, = play(engine, "sum", call=lambda name, arguments: {"result": "9" * 5000})
    assert episode.finish_reason == "length" and all(episode.action_mask) and len(episode.calls) == 1


def test_what_stands_between_two_turns_is_what_the_chat_format_writes():
    talk = [OFFER, *CANONICAL["at once"][:-1]]
    for thinking in (False, True):
        whole = TOKENIZER.encode_segments([[*render(talk), *generation_prompt(thinking)]])[0][0]
        before = TOKENIZER.encode(talk[:3])[0][:-1]
        observed = observation(TOKENIZER, [{"result": "3"}, {"result": "20"}], thinking)
        assert before + observed == whole


def test_results_are_the_same_under_a_seed(engine):
    runs = [play(engine, "sum", call=partial(call_tool, seed=7))[0].completion_ids for _ in range(2)]
    assert runs[0] == runs[1]
