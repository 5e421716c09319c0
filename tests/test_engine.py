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

import eval_llm
from model.chat import BOS, EOS, ChatTokenizer
from model.engine import Engine, Sampling, generate
from model.errors import run_main
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
    assert [sequence.ids for sequence in generate(model, prompts, greedy(20))] == expected
    assert [sequence.ids for sequence in generate(model, prompts, greedy(20), max_batch=2)] == expected


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

    add = Engine.add

    def recording(engine, prompt, sampling):
        seen.append(prompt)
        return add(engine, prompt, sampling)

    monkeypatch.setattr(Engine, "add", recording)
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
    step, steps = Engine.step, iter(range(1000))

    def interrupted(engine):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    out = evaluate(lines=["Who are you?", KeyboardInterrupt, "/clear", "And now?", "/exit"])
    first, second = TALK[1]["content"], TALK[3]["content"]
    assert second in out and first not in out
    assert out.split(" …")[0].removeprefix(eval_llm.HELP).strip() in first
    assert out.count(eval_llm.HELP) == 2  # at the start, and when there was no answer to stop
