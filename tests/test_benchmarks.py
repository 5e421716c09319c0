"""What measures: a step taken apart, and choices compared in the same time."""

import json
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from lab import ROOT

from benchmarks import busy_machine, decode_speed, gpu_check, profile_step, quality, rl_speed
from model.chat import ChatTokenizer
from model.cli import Failure
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import train_tokenizer
from trainer import train_pretrain
from trainer import trainer as loop
from trainer.batches import BatchStream
from trainer.losses import next_token_loss
from trainer.run import Run


@pytest.fixture
def saved(monkeypatch) -> dict:
    """What a benchmark saves, by name."""
    found = {}
    for module in (busy_machine, profile_step, quality, decode_speed, rl_speed):
        monkeypatch.setattr(module, "save_result", lambda name, numbers: found.update({name: numbers}))
    return found


def test_a_profile_takes_a_step_apart(data, saved, one_thread, monkeypatch):
    monkeypatch.setattr(Run, "compile", lambda *_: None)
    with mock.patch.object(sys, "argv", [
            "profile_step.py", f"--data_path={data / 'pretrain.jsonl'}", "--hidden_size=64", "--num_hidden_layers=2",
            "--batch_size=2", "--steps=2", "--device=cpu", "--kernels=50"]):
        profile_step.main()
    found, = saved.values()
    assert sum(found["kinds"].values()) == pytest.approx(1) and found["kinds"]["matrix products"] > 0
    assert len(found["largest"]) == 50 and found["largest"][0]["share"] >= found["largest"][1]["share"]
    products, = [one["calls_a_step"] for one in found["largest"] if one["kernel"] == "aten::mm"]
    assert products == 3 * (2 * 7 + 1)  # forward, and both gradients, of each layer's weights and of the head
    assert found["seconds_a_step"] > 0 and 0 < found["data_wait"] < 1


def test_without_document_masking_training_rows_are_one_document_and_validation_is_as_ever(lab, monkeypatch):
    lab, seen = lab(), {True: [], False: []}

    def watched(model, batch):
        seen[model.training].append(batch)
        return next_token_loss(model, batch)

    monkeypatch.setattr(train_pretrain, "next_token_loss", watched)
    monkeypatch.setattr(loop, "text_loss", lambda model, batch, **_: watched(model, batch))
    val = lab.data / "pretrain_val.jsonl"
    quality.train_changed("no document masking", lab.flags(train_pretrain, max_steps=2, val_data_path=val))
    for training, batches in seen.items():
        for batch in batches:
            B, T = batch["input_ids"].shape
            bounds = batch["cu_seqlens"].unique()
            assert bounds.equal(torch.arange(B + 1, dtype=torch.int32) * T) is training
            assert batch["position_ids"].equal(torch.arange(T).expand(B, T)) is training


def test_a_cosine_may_fall_to_zero_and_a_ramp_takes_all_rows():
    with quality.fall_to_zero():
        rates = [loop.learning_rate(step, 105, 1.0, 5, "cosine") for step in range(105)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1]) and rates[55] == pytest.approx(0.5)
    assert 0 < rates[104] < 3e-4
    stream = SimpleNamespace(rows_per_step=8, steps=16, seed=0, dataset=range(128))
    with quality.ramp_batch():
        rows = [BatchStream.rows(stream, step) for step in range(16)]
    assert [len(step) for step in rows] == [4] * 8 + [8] * 4 + [16] * 4
    assert sorted(np.concatenate(rows)) == list(range(128))


def test_tokenizers_are_made_of_as_many_rows_of_each_language_as_asked_and_of_groups_of_digits(tmp_path):
    rows = [{"text": f"今天{number}点下雨" if number % 2 else f"It rains at {number}."} for number in range(480)]
    source, texts = tmp_path / "rows.jsonl", []
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def learn(some, vocab_size):
        texts.append(list(some))
        return original(iter(texts[-1]), vocab_size)

    original, sizes = train_tokenizer.train, {}
    with mock.patch.object(train_tokenizer, "train", learn):
        for shares in ((1, 1, 1), (1, 4, 3)):
            tokenizer = ChatTokenizer(quality.make_tokenizer(source, *shares, tmp_path))
            sizes[shares[2]] = len(tokenizer.encode_text("111"))
    assert [sum("今天" in text for text in some) for some in texts] == [20, 80]
    assert [sum("rains" in text for text in some) for some in texts] == [20, 20]
    assert sizes[1] == 3 > sizes[3]


def test_choices_get_the_same_time(data, saved, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "pretrain.jsonl").read_text() * 40)
    with mock.patch.object(sys, "argv", [
            "quality.py", "--choices=levers", "--only", "+ 8 rows a step, 2e-3", "--seconds=1", "--seeds=1",
            "--hidden_size=64", "--num_hidden_layers=2", f"--data_path={rows}",
            f"--val_data_path={data / 'pretrain_val.jsonl'}"]), mock.patch.object(quality, "NUM_CALIBRATION_ROWS", 64):
        quality.main()
    (one,), = saved["quality_levers_1s"].values()
    assert one["val_bpb"] > 0 and one["steps"] > 1 and one["seconds"] > 0
    json.dumps(saved)


TINY = ("--hidden_size=64", "--num_hidden_layers=1", "--repeats=1", "--device=cpu")


def test_decoding_is_timed_against_the_plain_loop(saved, one_thread):
    with mock.patch.object(sys, "argv", ["decode_speed.py", *TINY, "--prompt=4", "--tokens=3", "--cases", "alone",
                                         "constrained", "256 at once"]):
        decode_speed.main()
    found = saved["decode_speed_64x1"]
    for case in (found["alone"], found["256 at once"]):
        assert case["ratio"] == case["engine"] / case["plain"] > 0 and case["bandwidth_share"] > 0
    constrained = saved["decode_constrained_64x1"]
    assert constrained["ratio"] == constrained["constrained"] / constrained["free"] > 0


def test_decoding_is_timed_against_llama_cpp(saved, one_thread):
    pytest.importorskip("xllamacpp")
    arguments = ["decode_speed.py", *TINY, "--prompt=4", "--tokens=3", "--peer=llama.cpp"]
    with mock.patch.object(sys, "argv", [*arguments, "--cases", "alone"]):
        decode_speed.main()
    alone = saved["decode_llama_cpp_64x1"]["alone"]
    for dtype in ("f16", "q8_0"):
        assert alone[f"ratio to {dtype}"] == pytest.approx(alone["engine"] / alone[dtype])
    with mock.patch.object(sys, "argv", [*arguments, "--cases", "arriving"]), pytest.raises(SystemExit):
        decode_speed.main()


def test_decoding_is_timed_beside_busy_programs(saved, one_thread):
    with mock.patch.object(sys, "argv", ["busy_machine.py", "--work=decoding", "--hidden_size=64", "--busy", "1",
                                         "--seconds=1"]):
        busy_machine.main()
    for results in saved["busy_machine_decoding"].values():
        assert [*results] == ["1"] and all(speeds["adapted"] > 0 < speeds["fixed"] for speeds in results.values())


def test_bytes_a_token_are_its_share_of_the_weights_and_the_keys_it_looks_at():
    model = MiniMindForCausalLM(MiniMindConfig(64, 1)).bfloat16()
    weights, heads = sum(p.numel() for p in model.parameters()), 4 * 8
    assert decode_speed.bytes_per_token(model, [([1] * 6, 4), ([1] * 10, 12)]) == weights + 2 * heads * 2 * 12


def test_requests_are_taken_apart_into_passes_and_what_is_done_between(one_thread):
    model = MiniMindForCausalLM(MiniMindConfig(64, 1)).eval().requires_grad_(False)
    times = decode_speed.profile_requests(model, [([40] * 6, 3), ([41] * 6, 3)], 0)
    assert times["prefill"]["tokens"] == 12 and (times["decode"]["passes"], times["decode"]["tokens"]) == (2, 4)
    for phase in ("prefill", "decode"):
        assert 0 < times[phase]["products"] < times[phase]["all"] > times[phase]["attention"] > 0
    assert min(times["other"][part] for part in ("scheduling", "sampling", "all")) > 0


@pytest.mark.parametrize("agent", [[], ["--agent"]], ids=["steps", "episodes"])
def test_online_rl_is_timed_against_the_plain_recipe(saved, one_thread, agent):
    with mock.patch.object(sys, "argv", ["rl_speed.py", *TINY, "--answers=24", *agent]):
        rl_speed.main()
    found, = saved.values()
    assert found["ratio"] > 0 if agent else min(found["ratios"].values()) > 0


@pytest.mark.parametrize("flags", [["levers"], ["epochs", "--seconds=1"], ["vocabulary"], ["recipes"]],
                         ids=lambda flags: flags[0])
def test_choices_that_need_a_time_or_tokens_ask_for_them(capsys, flags):
    with mock.patch.object(sys, "argv", ["quality.py", "--data_path=x", "--val_data_path=x", "--choices", *flags]), \
            pytest.raises(SystemExit) as ended:
        quality.main()
    assert ended.value.code == 2 and f"--choices {flags[0]}" in (error := capsys.readouterr().err)
    assert "give --seconds" in error or "give --tokens" in error and (ROOT / "benchmarks").is_dir()


def test_a_device_is_compared_with_the_cpu_and_a_failing_check_stops_nothing(one_thread, monkeypatch, capsys, device):
    saved = {}
    monkeypatch.setattr(gpu_check, "save_result", lambda name, numbers: saved.update(numbers))
    flags = ["--hidden_size=64", "--num_hidden_layers=1", f"--device={device}"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "kernels", "steps", *flags])
    layouts = [layout for layout in gpu_check.attention_layouts() if "shared prompt" in layout[0]]
    monkeypatch.setattr(gpu_check, "attention_layouts", lambda: iter(layouts))
    monkeypatch.setattr(gpu_check, "training_dtype", lambda device: torch.float32)
    monkeypatch.setattr(gpu_check, "STEPS", {"eager": {}, "checkpointing": {"checkpointing": True}})
    monkeypatch.setattr(gpu_check, "milliseconds", lambda work, device: 1.0)
    monkeypatch.setattr(gpu_check, "sample", mock.Mock(side_effect=RuntimeError("no kernel image")))
    with pytest.raises(Failure, match="failed: 1,"):
        gpu_check.main()
    rows = {row["what"]: row for table in saved["tables"].values() for row in table}
    assert rows["sampling"]["error"] == "RuntimeError: no kernel image" and not rows["sampling"]["ok"]
    assert [name for name, row in rows.items() if not row.get("ok", True)] == ["sampling"]
    assert {"dense, checkpointing", "MoE, eager"} <= rows.keys()
    assert "| sampling |  | RuntimeError: no kernel image |  | **NO** |" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_on_the_device_does_not_pass():
    factors = iter((1.01, 1.0))  # the device's run, and the reference
    row = gpu_check.compare(lambda x: x * next(factors, 1.0), [torch.ones(4)], torch.device("cpu"), torch.float32)
    assert not row["ok"] and row["error"] == pytest.approx(0.01, rel=1e-3)
