"""Flags of every program: what cannot be is refused in one line, before anything is read, made or written."""

import importlib
import os
import sys
from argparse import ArgumentError
from pathlib import Path
from unittest import mock

import pytest
from lab import ROOT

from model.cli import Parser, UserError
from scripts import score_sample
from trainer import train_agent, train_pretrain

PROGRAMS = sorted(str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for pattern in (
    "eval_*.py", "scripts/*.py", "trainer/train_*.py", "benchmarks/*.py", "dataset/sample_world.py")
    for path in ROOT.glob(pattern) if "arse_args(" in path.read_text("utf-8"))


def parser_of(program: str) -> Parser:
    """The parser of a program, which is stopped where it parses its flags."""
    class Parsed(Exception):
        pass

    def stop(parser, *_):
        raise Parsed(parser)

    module = importlib.import_module(program)
    with mock.patch.object(Parser, "parse_known_args", stop), mock.patch.object(sys, "argv", [program]), \
            mock.patch.object(sys, "path", [*sys.path]), pytest.raises(Parsed) as parsed:
        getattr(module, "launch", module.main)()
    return parsed.value.args[0]


@pytest.mark.parametrize("program", PROGRAMS)
def test_numbers_that_cannot_be_are_refused_by_every_flag(program):
    parser, absurd = parser_of(program), (-1, "nan", "inf", "many", 10**30)
    for action in parser._actions:
        if action.type not in (None, str, Path) and action.type.__name__ not in ("optional_name", "<lambda>"):
            for value in absurd:
                with pytest.raises(ArgumentError, match=action.option_strings[0]):
                    parser._get_values(action, [str(value)] * (action.nargs if isinstance(action.nargs, int) else 1))


@pytest.mark.parametrize("words, flags", [
    (["7 attention heads"], {"num_attention_heads": 7}), (["3 key-value heads"], {"num_key_value_heads": 3}),
    (["head_dim 1 is odd"], {"num_attention_heads": 64}), (["num_experts_per_tok 5"], {"num_experts_per_tok": 5}),
    (["--hidden_size", "'999999999'"], {"hidden_size": 999_999_999}),
    (["GB in fp32", "--hidden_size"], {"hidden_size": 2**18}),
    (["--max_seq_len", "'1000000000000'"], {"max_seq_len": 10**12}),
    (["has 32,768 positions", "32,769", "lower --max_seq_len"], {"max_seq_len": 32_769}),
    (["--batch_size", "'0'"], {"batch_size": 0}), (["--epochs", "'-1'"], {"epochs": -1}),
    (["--batch_size 1,048,576 x --accumulation_steps 2"], {"batch_size": 2**20}),
    (["--seed", "18446744073709551616"], {"seed": 2**64}),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_sizes_and_counts_that_cannot_be_are_told_in_one_line(lab, capsys, words, flags):
    lab().fails(capsys, 2, *words, **flags)


@pytest.mark.parametrize(("program", "flags", "unused"), [
    ("train_grpo", "--judge_model x --trust_remote_code 1 --rollout_url http://x --max_mismatch 1 --epsilon 0.1",
     "judge_model trust_remote_code rollout_url max_mismatch epsilon"),
    ("train_grpo", "--loss_type grpo --epsilon 0.1 --spo_half_life 1", "spo_half_life"),
    ("train_grpo", "--loss_type spo --scale_rewards 0 --spo_half_life 1", "scale_rewards"),
    ("train_dpo", "--simpo_gamma 1", "simpo_gamma"), ("train_dpo", "--simpo_gamma 1 --loss_type simpo", ""),
    ("train_distillation", "--teacher_load_from . --teacher_hidden_size 64 --teacher_use_moe 0",
     "teacher_hidden_size teacher_use_moe"),
    ("train_distillation", "--teacher_hidden_size 64 --teacher_use_moe 0", ""),
    ("train_grpo", "--target_kl 0.1", "target_kl"), ("train_grpo", "--target_kl 0.1 --mini_batches 3", ""),
    ("train_ppo", "", ""),
    ("eval_toolcall", "--benchmark 1 --prompt x --tools calculate_math --model m", "prompt tools model"),
    ("eval_toolcall", "--benchmark 1 --history 2 --show_speed 1", "history show_speed"),
    ("eval_llm", "--prompt x --questions --history 2", "history questions"),
    ("scripts.eval_benchmark", "--benchmark arc x --picture x.png --lengths 300 --max_seq_len 9",
     "picture lengths max_seq_len"),
    ("eval_toolcall", "--backend api --weight pretrain --json x", "json weight")])
def test_flags_without_an_effect_are_named(program, flags, unused, monkeypatch, capsys):
    is_stage = program.startswith("train")
    module = importlib.import_module(f"trainer.{program}" if is_stage else program)
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    if not is_stage:
        module.parse_arguments()
    else:  # parses its flags before anything else
        monkeypatch.setattr(module, "Run", mock.Mock(side_effect=KeyError))
        with pytest.raises(KeyError):
            module.main()
    said = [line.split(" is not used: it has an effect ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"--{flag}" for flag in unused.split()]


def test_the_largest_seed_is_a_seed(lab):
    plain = lab()
    plain.train(seed=2**64 - 1, max_steps=1)
    assert [row["step"] for row in plain.log()] == [1]
    lab = lab().with_base()
    lab.train(train_agent, seed=2**64 - 1, max_steps=1, from_weight="full_sft", max_gen_len=4, max_total_len=128)
    assert [row["step"] for row in lab.log("agent_64")] == [1]


def test_too_little_memory_is_told_in_one_line(lab, capsys, monkeypatch):
    lab, errors = lab(), [MemoryError("Unable to allocate 7 TiB"), RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GiB)")]
    for error in errors:
        monkeypatch.setattr(train_pretrain, "next_token_loss", mock.Mock(side_effect=error))
        lab.fails(capsys, 1, "out of memory")


def test_a_file_that_is_read_is_not_written_over(tmp_path, capsys):
    path = tmp_path / "cases.jsonl"
    path.write_text("{}")
    parser = parser_of("eval_toolcall")
    with pytest.raises(SystemExit):
        parser.parse_args(["--cases", str(path), "--json", str(tmp_path / "." / "cases.jsonl")])
    assert "is what --cases reads, and would be lost" in capsys.readouterr().err
    assert parser.parse_args(["--cases", str(path), "--json", str(tmp_path / "scores.json")]).json
    assert parser.parse_args(["--json", os.devnull]).json  # a number among the flags is no open file, such as stdin


@pytest.mark.parametrize("line, words", [
    ('{"conversations": [{"role": "user", "content": "x"}]}', ":1: a case is a conversation of two messages or more"),
    ('{"text": "x"}', ":1: a case is a conversation"), ("\n", "no case in it")])
def test_cases_that_are_none_are_told_in_one_line(tmp_path, line, words):
    (tmp_path / "cases.jsonl").write_text(f"{line}\n")
    with mock.patch.object(sys, "argv", ["", "--data_path", str(tmp_path / "cases.jsonl")]), \
            pytest.raises(UserError, match=f"cases.jsonl:? ?{words}"):
        score_sample.main()
