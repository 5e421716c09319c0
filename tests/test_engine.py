"""The inference engine against plain decoding without a cache, and the terminal chat on top of it."""

import builtins
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.testing import assert_close

import eval_llm
from model.chat import BOS, EOS, ChatTokenizer
from model.engine import Sampling, generate, next_tokens, stream
from model.errors import UserError, run_main
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weight

KINDS = {"dense": {}, "moe": {"use_moe": True}, "moe-top2": {"use_moe": True, "num_experts_per_tok": 2}}
every_kind = pytest.mark.parametrize("kind", KINDS)
greedy = partial(Sampling, temperature=0, stop_ids=())
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
TOKENIZER = ChatTokenizer()


def lively_model(kind: str = "dense", **options) -> MiniMindForCausalLM:
    """A small model whose weights are large enough that every token and position matters."""
    model = MiniMindForCausalLM(MiniMindConfig(**{**SMALL, "vocab_size": 97, **KINDS[kind], **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model.eval().requires_grad_(False)


def some_prompts(*lengths: int) -> list[list[int]]:
    dice = random.Random(1)
    return [[dice.randrange(36, 97) for _ in range(length)] for length in lengths]


def plainly(model: MiniMindForCausalLM, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest continuation, the whole text read again for every token."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


# -- decoding ----------------------------------------------------------------------------------------------------------


@every_kind
def test_batched_greedy_answers_are_those_of_one_by_one_decoding_without_a_cache(kind):
    model, prompts = lively_model(kind), some_prompts(7, 1, 19, 3, 12)
    expected = [plainly(model, prompt, 20) for prompt in prompts]
    tokens = {token for answer in expected for token in answer}
    assert len({tuple(answer) for answer in expected}) == 5 and len(tokens) > 9
    assert generate(model, prompts, greedy(20)) == expected
    assert generate(model, prompts, greedy(20), batch_size=2) == expected


def test_a_stop_token_ends_its_row_and_no_other():
    model, prompts = lively_model(), some_prompts(5, 9, 2)
    whole = [plainly(model, prompt, 12) for prompt in prompts]
    stop = whole[1][3]
    rows = list(stream(model, prompts, greedy(12, stop_ids=(stop,))))
    for number, answer in enumerate(whole):
        end = answer.index(stop) + 1 if stop in answer else 12
        assert [row[number] for row in rows] == (answer[:end] + [None] * 12)[:len(rows)]
    expected = [answer[:answer.index(stop)] if stop in answer else answer for answer in whole]
    assert generate(model, prompts, greedy(12, stop_ids=(stop,))) == expected
    assert len(expected[1]) <= 3 and max(map(len, expected)) == 12


def test_the_same_seed_draws_the_same_whatever_the_neighbours():
    model, prompts = lively_model(), some_prompts(4, 11, 7)
    sampling = Sampling(24, temperature=1.0, top_p=1.0, seed=5, stop_ids=())
    answers = generate(model, prompts, sampling)
    assert generate(model, prompts, sampling) == answers
    assert generate(model, prompts, sampling, batch_size=1) == answers
    assert generate(model, prompts[:1], sampling) == answers[:1]
    assert generate(model, [prompts[0], *some_prompts(1, 30, 2)], sampling)[0] == answers[0]
    assert generate(model, prompts, Sampling(24, 1.0, 1.0, seed=6, stop_ids=())) != answers


def test_equal_prompts_draw_different_answers_also_in_different_batches():
    model, prompt = lively_model(), some_prompts(6)[0]
    answers = generate(model, [prompt] * 6, Sampling(24, temperature=1.0, top_p=1.0, stop_ids=()), batch_size=2)
    assert len({tuple(answer) for answer in answers}) == 6


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.5, 0.7), (1.0, 0.0)])
def test_draws_follow_the_truncated_softmax(temperature, top_p):
    logits = [0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -3.0, 0.7]
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).exp()
    kept, mass = torch.zeros(8, dtype=torch.float64), 0.0
    for token in sorted(range(8), key=lambda token: -logits[token]):
        if mass < top_p or mass == 0:  # the likeliest tokens until their mass reaches top_p
            kept[token] = weights[token]
            mass += float(weights[token] / weights.sum())
    draws, generator = 20_000, torch.Generator().manual_seed(3)
    tokens = next_tokens(torch.tensor([logits]).expand(draws, -1), Sampling(1, temperature, top_p), [generator] * draws)
    share = tokens.bincount(minlength=8) / draws
    assert_close(share.double(), kept / kept.sum(), rtol=0, atol=0.015)  # four standard deviations
    assert (share[kept == 0] == 0).all()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]])
    assert next_tokens(logits, Sampling(1, temperature=0), []).tolist() == [1, 0]


def test_a_prompt_without_room_for_an_answer_is_a_mistake():
    model, fits, too_long = lively_model(max_position_embeddings=16), *some_prompts(15, 16)
    assert len(generate(model, [fits, fits[:3]], greedy(40))[0]) == 2  # what the last two positions predict
    with pytest.raises(UserError, match="16 tokens .* 16 positions"):
        generate(model, [too_long], greedy(1))


def test_no_prompts_have_no_answers():
    assert generate(lively_model(), [], greedy(4)) == []


# -- the terminal chat -------------------------------------------------------------------------------------------------

TEXT = ("Once upon a time", " there was a cat in a red house.")
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A very small model, 你好!"},
        {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still the same."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that has learned one text and one conversation by heart, saved under the names of two stages."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**SMALL))
    rows = [[BOS, *TOKENIZER.encode_text("".join(TEXT)), EOS], TOKENIZER.encode(TALK)[0], TOKENIZER.encode(TALK[2:])[0]]
    ids = torch.zeros(3, max(map(len, rows)), dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[:len(tokens)] = torch.tensor(tokens)
    labels = ids.masked_fill(ids == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    where = tmp_path_factory.mktemp("out")
    for name in ("pretrain", "full_sft"):
        save_weight(model, name, where, TOKENIZER)
    return where


@pytest.fixture
def evaluate(folder, capsys) -> Callable[..., str]:
    """Run eval_llm.py with flags, and with `lines` typed by a user if any; → what it prints."""

    def run(*flags: str, lines: Iterator | list = ()) -> str:
        lines = iter(lines)

        def typed(prompt: str) -> str:
            line = next(lines, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        argv = ["eval_llm.py", f"--save_dir={folder}", "--device=cpu", "--temperature=0", "--max_new_tokens=40", *flags]
        with mock.patch.object(sys, "argv", argv), mock.patch.object(builtins, "input", typed):
            run_main(eval_llm.main)
        assert next(lines, None) is None, "not everything typed was read"
        return capsys.readouterr().out

    return run


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The prompts that reach the engine."""
    seen = []

    def recording(model, rows, sampling):
        seen.extend(rows)
        return stream(model, rows, sampling)

    monkeypatch.setattr(eval_llm, "stream", recording)
    return seen


def test_a_prompt_is_answered_once(evaluate):
    assert evaluate("--prompt=Who are you?").strip() == TALK[1]["content"]


def test_a_pretrained_weight_goes_on_with_the_text(evaluate):
    assert evaluate("--weight=pretrain", f"--prompt={TEXT[0]}").strip() == TEXT[1].strip()


def test_an_empty_prompt_is_a_mistake(evaluate, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate("--prompt= ")
    assert capsys.readouterr().err == "error: --prompt is empty\n"


def test_an_absent_weight_is_told_in_one_line(evaluate, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate("--weight=grpo", "--prompt=hello")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "full_sft_64, pretrain_64" in said[0]


def test_the_built_in_questions_are_answered(evaluate, prompts):
    out = evaluate("--questions", "--max_new_tokens=2")
    assert all(question in out for question in eval_llm.QUESTIONS) and len(prompts) == len(eval_llm.QUESTIONS)
    assert TOKENIZER.prompt([{"role": "user", "content": eval_llm.QUESTIONS[-1]}]) == prompts[-1]


@pytest.mark.parametrize("ending", ["/exit", EOFError], ids=["exit", "end-of-input"])
def test_a_conversation_is_remembered_until_it_is_cleared(evaluate, prompts, ending):
    out = evaluate(lines=["Who are you?", " ", "And now?", "/clear", "And now?", ending])
    assert prompts == [TOKENIZER.prompt(TALK[:1]), TOKENIZER.prompt(TALK[:3]), TOKENIZER.prompt(TALK[2:3])]
    assert Counter(line for line in out.splitlines() if line) == Counter(
        [eval_llm.HELP, TALK[1]["content"], TALK[3]["content"], TALK[3]["content"]])


def test_ctrl_c_ends_an_answer_but_not_the_program(evaluate, monkeypatch):
    calls = iter([True, False])

    def interrupted(*request):
        stops = next(calls)
        for number, tokens in enumerate(stream(*request)):
            if stops and number == 3:
                raise KeyboardInterrupt
            yield tokens

    monkeypatch.setattr(eval_llm, "stream", interrupted)
    out = evaluate(lines=["Who are you?", KeyboardInterrupt, "/clear", "And now?", "/exit"])
    first, second = TALK[1]["content"], TALK[3]["content"]
    assert second in out and first not in out
    assert out.split(" …")[0].removeprefix(eval_llm.HELP).strip() in first
    assert out.count(eval_llm.HELP) == 2  # at the start, and when there was no answer to stop
