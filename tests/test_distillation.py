"""Distillation against trl's loss and plain arithmetic, from our weights and from transformers folders; tag weights."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lab import TOKENIZER, small_model
from torch.testing import assert_close

from dataset.lm_dataset import SFTDataset
from model.transformers_io import save_folder
from model.weights import load_weight
from trainer import train_distillation, train_full_sft
from trainer.losses import TAG_TOKENS, distillation_loss, kl_divergence, model_inputs, next_token_loss, teacher_logits

pytestmark = pytest.mark.usefixtures("one_thread")
DISTIL = {"stage": train_distillation, "from_weight": "none", "from_teacher_weight": "full_sft", "teacher_use_moe": 0,
          "student_hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def batch(data, tmp_path) -> dict[str, torch.Tensor]:
    rows = SFTDataset(data / "sft.jsonl", TOKENIZER, 64, cache_dir=tmp_path)
    return rows.batch(torch.arange(3).numpy())


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_divergence_is_the_one_of_trl_and_of_the_definition(reverse):
    student, teacher = 3 * torch.randn(2, 5, 40)
    ours = kl_divergence(student, teacher, 1.5, reverse)
    GKDTrainer = pytest.importorskip("trl.experimental.gkd", reason="trl needs python 3.11").GKDTrainer
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=float(reverse), temperature=1.5,
                                             reduction="none")
    assert_close(ours, theirs.sum(-1).flatten(), rtol=1e-5, atol=1e-6)
    p, q = ((logits / 1.5).softmax(-1) for logits in ((student, teacher) if reverse else (teacher, student)))
    assert_close(ours, (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_the_loss_is_its_definition_and_balancing_is_not_scaled(batch):
    student, teacher = small_model(use_moe=True), small_model(hidden_size=32)
    loss = distillation_loss(student, batch, teacher, alpha=0.3, temperature=2.0, reverse=False)
    ours, theirs = student(**model_inputs(batch)), teacher(**model_inputs(batch)).logits
    p, log_q = (theirs / 2).softmax(-1), (ours.logits / 2).log_softmax(-1)
    nats = F.cross_entropy(ours.logits, batch["targets"], reduction="sum")
    assert_close(loss.loss_sum, 0.3 * nats + 0.7 * 4 * (p * (p.log() - log_q)).sum())
    assert_close(loss.aux_loss, student.config.router_aux_loss_coef * ours.aux_loss)
    loss.loss_sum.backward()
    assert all(p.grad is None for p in teacher.parameters())
    same = distillation_loss(teacher, batch, teacher, alpha=0.0, temperature=2.0, reverse=False)
    assert same.loss_sum.abs() < 1e-3


def test_a_teacher_of_transformers_sees_the_documents_apart(batch, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = small_model()
    save_folder(ours, tmp_path / "folder", TOKENIZER)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert_close(teacher_logits(theirs, batch), teacher_logits(ours, batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"student_use_moe": 1}, {"reverse_kl": 1}], ids=["dense", "moe", "reverse"])
def test_a_student_learns_of_a_teacher_of_another_size(lab, options):
    lab = lab().with_base(num_hidden_layers=1)
    stem = "full_dist_32" + "_moe" * ("student_use_moe" in options)
    lab.train(**DISTIL, learning_rate=3e-3, teacher_hidden_size=64, teacher_num_layers=1, epochs=3, val_data_path=(
        lab.data / "sft.jsonl"), **options)
    log = lab.log(stem)
    assert {"nats", "kl", "val_loss", "val_bpb"} <= log[-1].keys() and log[-1]["loss"] < log[0]["loss"] - 0.3
    assert log[-1]["loss"] == pytest.approx(0.5 * log[-1]["nats"] + 0.5 * 2.25 * log[-1]["kl"], rel=1e-4)
    assert load_weight("full_dist", lab.out)[1]["parent"] == "none"


def test_a_folder_teaches_as_the_weight_it_was_written_from(lab, tmp_path):
    lab = lab().with_base()
    save_folder(load_weight("full_sft", lab.out)[0], tmp_path / "teacher", TOKENIZER)
    lab.train(**DISTIL, max_steps=2)
    expected = lab.losses("full_dist_32")
    lab.train(**DISTIL, max_steps=2, teacher_load_from=tmp_path / "teacher")
    assert lab.losses("full_dist_32") == pytest.approx(expected, rel=1e-4)


def test_a_distillation_resumes_to_the_bit(lab):
    whole, parts = lab("whole"), lab("parts")
    for place in (whole, parts):
        torch.manual_seed(1)
        place.with_base()
    whole.train(**DISTIL, epochs=1)
    parts.train(**DISTIL, epochs=1, max_steps=2)
    parts.train(**DISTIL, epochs=1, from_resume=1)
    assert parts.ended_like(whole, "full_dist_32")


def test_mistakes_are_told_in_one_line(lab, capsys, tmp_path):
    lab = lab().with_base()
    lab.fails(capsys, 2, "--temperature 0", **DISTIL, temperature=0)
    lab.fails(capsys, 2, "--teacher_num_layers 5", "has 2", **DISTIL, teacher_num_layers=5)
    lab.fails(capsys, 2, "its own teacher", stage=train_distillation, from_weight="full_sft", hidden_size=64,
              teacher_use_moe=0)
    lab.fails(capsys, 2, "full_sft_64_moe.pth", stage=train_distillation, teacher_hidden_size=64)
    lab.fails(capsys, 2, "full_sft_96.pth", **DISTIL, teacher_hidden_size=96)
    save_folder(small_model(), tmp_path / "other", TOKENIZER)
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = itertools.islice((token for token, number in vocabulary.items() if number > 300), 2)
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    lab.fails(capsys, 2, "--teacher_load_from", "vocabulary", "generate_answers.py", **DISTIL | {"teacher_use_moe": 1},
              teacher_load_from=tmp_path / "other")


# -- --tag_loss_weight -------------------------------------------------------------------------------------------------


def tagged_rows(folder: Path) -> Path:
    call = [{"name": "clock", "arguments": {}}]
    rows = [{"conversations": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3",
                                                                       "reasoning_content": "1 + 2 = 3"}]},
            {"conversations": [{"role": "user", "content": "time?"}, {"role": "assistant", "tool_calls": call}]}] * 4
    path = folder / "tagged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_tag_counts_as_often_as_asked_for_and_once_as_a_token(tmp_path):
    rows = SFTDataset(tagged_rows(tmp_path), TOKENIZER, 64, cache_dir=tmp_path, empty_think_ratio=0)
    batch, model = rows.batch(torch.arange(len(rows)).numpy()), small_model()
    assert {int(i) for i in batch["targets"]} >= set(TAG_TOKENS)
    nats = F.cross_entropy(model(**model_inputs(batch)).logits, batch["targets"], reduction="none")
    weight = torch.tensor([10.0 if int(i) in TAG_TOKENS else 1.0 for i in batch["targets"]])
    assert_close(next_token_loss(model, batch, tag_weight=10.0).loss_sum, (weight * nats).sum())


def test_sft_hands_the_tag_weight_on(lab, monkeypatch, tmp_path):
    used = []
    monkeypatch.setattr(train_full_sft, "next_token_loss", lambda model, batch, tag_weight: used.append(tag_weight) or
                        next_token_loss(model, batch, tag_weight))
    lab().train(train_full_sft, max_steps=1, tag_loss_weight=10, data_path=tagged_rows(tmp_path), accumulation_steps=1)
    assert used == [10.0]


