"""Training, from rows to files: stages run as users run them, on tiny models, compared with plain arithmetic."""

import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lab import DEADLINE, FLAGS, ROOT, SMALL, TOKENIZER, Lab, small_model, wait_for
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from model.chat import BOS, EOS
from model.cli import UserError
from model.weights import find_weight, load_weight, save_weight
from trainer import metrics, train_full_sft, train_pretrain
from trainer import trainer as loop
from trainer.batches import BatchStream, adapt_batch
from trainer.checkpoint import save_resume
from trainer.distributed import World
from trainer.flops import flops_per_token
from trainer.losses import Loss, aux_loss_term, model_inputs, next_token_loss
from trainer.metrics import MetricsLog
from trainer.optimizer import Muon, learning_rate, make_optimizers
from trainer.run import Run
from trainer.train_ppo import ActorCritic

# -- stopping and going on ---------------------------------------------------------------------------------------------


def noisy_loss(model, batch) -> Loss:
    """A loss that draws random numbers, as sampling does."""
    return Loss(next_token_loss(model, batch).loss_sum * (1 + 0.1 * random.random() + 0.1 * torch.rand(())))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_k_steps_and_a_resume_are_2k_steps_bit_for_bit(lab, data, monkeypatch, optimizer):
    monkeypatch.setattr(train_pretrain, "next_token_loss", noisy_loss)
    whole, parts = lab("whole"), lab("parts")
    flags = {"optimizer": optimizer, "epochs": 1, "val_data_path": data / "pretrain_val.jsonl", "eval_interval": 3}
    whole.train(**flags)
    parts.train(**flags, max_steps=3)
    assert parts.state()["step"] == 3 < whole.state()["step"]
    parts.train(**flags, from_resume=1)
    assert parts.ended_like(whole)


def test_a_run_killed_in_the_middle_goes_on_as_if_nothing_had_happened(lab):
    whole, killed = lab("whole"), lab("killed")
    flags = {"epochs": 10, "save_interval": 3}
    process = killed.start(**flags)
    wait_for((killed.checkpoints / "pretrain_64_resume.pth").exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    whole.train(**flags)
    assert killed.state()["step"] < whole.state()["step"]
    killed.train(**flags, from_resume=1)
    assert killed.ended_like(whole)


def test_a_resumed_log_forgets_what_came_after_its_state(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    MetricsLog(path, 0).write({"step": 1, "loss": 1 / 3})
    path.write_text(path.read_text() + '{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    MetricsLog(path, 2).write({"step": 3, "loss": math.nan})
    assert path.read_text() == '{"step": 1, "loss": 0.333333}\n{"step": 2}\n{"step": 3, "loss": null}\n'
    with pytest.raises(OSError), mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
        MetricsLog(path, 3)
    assert path.read_text().count("\n") == 3  # nothing is lost
    MetricsLog(path, 0)
    assert path.read_text() == ""


def test_sigterm_and_sigint_end_a_run_with_everything_saved_and_status_0(lab):
    whole = lab("whole")
    stopped = {number: lab(number.name) for number in (signal.SIGTERM, signal.SIGINT)}
    processes = {number: place.start(epochs=6) for number, place in stopped.items()}
    for number, process in processes.items():
        log = stopped[number].out / "logs" / "pretrain_64.jsonl"
        wait_for(lambda log=log: log.exists() and log.stat().st_size > 0, process)
        process.send_signal(number)
    whole.train(epochs=6)
    for number, process in processes.items():
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0 and not err
        assert f"stopped by signal {number}" in out and "--from_resume 1" in out
        place = stopped[number]
        assert place.card()["step"] == place.state()["step"] == place.log()[-1]["step"] < whole.state()["step"]
        place.train(epochs=6, from_resume=1)
        assert place.ended_like(whole)


def test_a_loss_that_is_not_a_number_ends_the_run_and_spares_what_was_saved(lab, capsys, monkeypatch):
    lab = lab()
    lab.train(max_steps=2)
    saved, calls = lab.files(), itertools.count()

    def failing(model, batch):
        return Loss(next_token_loss(model, batch).loss_sum * (math.nan if next(calls) == 2 else 1))

    monkeypatch.setattr(train_pretrain, "next_token_loss", failing)
    capsys.readouterr()
    lab.fails(capsys, 1, "not finite", "--learning_rate", from_resume=1, log_interval=4)
    assert lab.files() == saved and next(calls) > 2


def test_a_full_disk_ends_the_run_in_one_line_and_spares_what_was_saved(lab, capsys):
    lab = lab()
    lab.train(max_steps=2)
    saved, limits = lab.files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        lab.fails(capsys, 1, "pretrain_64.pth", "not saved", "intact", from_resume=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lab.files() == saved


def test_no_memory_on_the_device_is_told_in_one_line(lab, capsys, monkeypatch):
    def too_large(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_pretrain, "next_token_loss", too_large)
    lab().fails(capsys, 1, "--batch_size", "--accumulation_steps")


# -- mistakes: one line, status 2 --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def other_tokenizer(path: Path) -> None:
    path.write_text(path.read_text().replace(TOKENIZER.hash, "0" * 16))


@pytest.mark.parametrize("words, flags", [
    (["nowhere.jsonl", "no such file"], {"data_path": "nowhere.jsonl"}),
    (["--data_path is empty"], {"data_path": ""}),
    (["--save_dir ~nobody_here", "home"], {"save_dir": "~nobody_here/out"}),
    (["--deepspeed_config", "--parallel deepspeed"], {"deepspeed_config": "zero2.json"}),
    (["--no_such_flag", "--help"], {"no_such_flag": 1}),
    (["--batch_size", "'two'"], {"batch_size": "two"}),
    (["--learning_rate", "nan"], {"learning_rate": "nan"}),
    (["--device abacus"], {"device": "abacus"}),
    (["--dtype float16"], {"dtype": "float16"}),
    (["65", "8"], {"hidden_size": 65}),
    (["tokenizer.json"], {"tokenizer": "nowhere"}),
    (["pretrain_64.pth", "nothing", "train it first"], {"from_weight": "pretrain"}),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_a_mistake_is_told_in_one_line(lab, capsys, words, flags):
    lab().fails(capsys, 2, *words, **flags)


def test_flags_that_change_nothing_are_told(lab, capsys):
    lab().train(max_steps=1, eval_interval=1, global_batch_size=2)  # and accumulation_steps, as every lab gives it
    assert capsys.readouterr().err.splitlines() == [
        "--accumulation_steps is not used: it follows from --global_batch_size",
        "nothing is validated: --eval_interval and --eval_first need --val_data_path"]


def test_a_parent_that_does_not_fit_is_told_in_one_line(lab, capsys):
    lab = lab()
    lab.train(max_steps=1)
    capsys.readouterr()
    child = {"stage": train_full_sft, "from_weight": "pretrain"}
    lab.fails(capsys, 2, "pretrain_96.pth", "there: pretrain_64", **child, hidden_size=96)
    lab.fails(capsys, 2, "--num_hidden_layers 3", "has 2", **child, num_hidden_layers=3)
    truncate(lab.out / "pretrain_64.pth")
    lab.fails(capsys, 2, "pretrain_64.pth", "not a weight file", **child)
    other_tokenizer(lab.out / "pretrain_64.json")
    lab.fails(capsys, 2, "another tokenizer", "--tokenizer", **child)


def other_tokenizer_folder(folder: Path) -> Path:
    """A tokenizer of as many entries, two of which have changed places."""
    other = shutil.copytree(TOKENIZER.folder, folder / "tokenizer", ignore=lambda *_: ["__pycache__", "inference"])
    path = other / "tokenizer.json"
    state = json.loads(path.read_text("utf-8"))
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(state), "utf-8")
    return other


def test_more_epochs_go_on_with_the_longer_schedule(lab, capsys):
    whole, parts = lab("whole"), lab("parts")
    whole.train(epochs=3, learning_rate=1e-3)
    parts.train(epochs=1, learning_rate=1e-3)
    done = parts.state()["step"]
    capsys.readouterr()
    parts.train(epochs=1, learning_rate=1e-3, from_resume=1)
    assert "nothing left to do; raise --epochs to continue" in capsys.readouterr().out
    parts.train(epochs=3, learning_rate=1e-3, from_resume=1)
    steps = whole.state()["step"]
    assert f"--epochs 3 stretches the schedule of the learning rate from {done} to {steps}" in capsys.readouterr().out
    assert [row["lr"] for row in parts.log()[done:]] == [row["lr"] for row in whole.log()[done:]]
    assert [row["tokens"] for row in parts.log()] == [row["tokens"] for row in whole.log()]  # of the same rows
    parts.train(epochs=1, learning_rate=1e-3, from_resume=1)
    assert f"cuts the schedule of the learning rate from {steps} to {done}" in capsys.readouterr().out


def test_a_state_of_another_size_is_not_passed_over_in_silence(lab, capsys):
    lab = lab()
    lab.train(max_steps=1)
    lab.train(max_steps=1, from_resume=1, hidden_size=32)
    assert "no pretrain_32_resume.pth yet (there: pretrain_64_resume.pth)" in capsys.readouterr().out


def test_a_state_that_does_not_fit_is_told_in_one_line(lab, data, capsys, tmp_path):
    lab = lab()
    lab.train(max_steps=1)
    capsys.readouterr()
    way_on = "--from_resume 0 --save_weight OTHER_NAME"
    for name, value, before in (("global_batch_size", 6, 4), ("optimizer", "muon", "adamw"),
                                ("weight_decay", 0.0, 0.01),
                                ("data_path", data / "pretrain_val.jsonl", data / "pretrain.jsonl")):
        lab.fails(capsys, 2, f"--{name} {value}: ", f"pretrain_64_resume.pth was made with {before};",
                  f"{way_on} --from_weight pretrain", from_resume=1, **{name: value},
                  **({"accumulation_steps": None} if name == "global_batch_size" else {}))
    for name, before in (("num_hidden_layers", 2), ("num_key_value_heads", 4)):
        lab.fails(capsys, 2, f"--{name} 1: ", f"was made with {before};", way_on, from_resume=1, **{name: 1})
    lab.fails(capsys, 2, f"--data_path {data / 'pretrain.jsonl'}: what it holds, or how it is read, has changed since",
              from_resume=1, tokenizer=other_tokenizer_folder(tmp_path))
    state = lab.state()
    for broken in ({"optimizers": [{}]}, {"stream": None, "optimizers": []}, {"settings": {}, "model": {}}):
        save_resume(lab.checkpoints / "pretrain_64_resume.pth", state | broken)
        lab.fails(capsys, 2, "pretrain_64_resume.pth does not fit", from_resume=1)
    truncate(lab.checkpoints / "pretrain_64_resume.pth")
    lab.fails(capsys, 2, "not a resume state", from_resume=1)
    torch.save(lab.weight(), lab.checkpoints / "pretrain_64_resume.pth")
    lab.fails(capsys, 2, "not a resume state", from_resume=1)


def test_programs_run_the_same_from_any_directory(lab):
    process = lab().start(cwd=ROOT / "trainer", data_path="nowhere.jsonl")  # the others start in the repository
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2 and not out
    assert err == f"error: --data_path {ROOT / 'trainer/nowhere.jsonl'}: no such file\n"


def test_importing_a_stage_leaves_the_path_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.path)
    for name in ("trainer.train_pretrain", "trainer.train_full_sft"):
        with mock.patch.dict(sys.modules):
            del sys.modules[name]
            __import__(name)
    assert sys.path == before


# -- the step ----------------------------------------------------------------------------------------------------------


def gradients(lab: Lab, monkeypatch, stage=train_full_sft, **flags) -> dict[str, torch.Tensor]:
    """The gradients a stage's first step hands to its optimizer."""
    seen = {}

    def spied_on(model, **rest):
        optimizers = make_optimizers(model, **rest)
        optimizers[0].register_step_pre_hook(lambda *_: seen.update(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        return optimizers

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_optimizers", spied_on)
        lab.train(stage, **{"max_steps": 1, "grad_clip": 0, **flags})
    return seen


def test_four_micro_steps_of_two_rows_are_one_step_of_eight(lab, monkeypatch):
    one = gradients(lab("one"), monkeypatch, batch_size=8, accumulation_steps=1)
    four = gradients(lab("four"), monkeypatch, batch_size=2, accumulation_steps=4)
    assert_close(four, one, rtol=0, atol=1e-6)
    assert_close(lab("four").losses("full_sft_64"), lab("one").losses("full_sft_64"), rtol=0, atol=1e-5)


def test_a_step_is_the_plain_mean_over_its_tokens_and_the_balancing_loss(lab, monkeypatch):
    batches, expected = [], {}

    def plain(model, batch):
        out = model(**model_inputs(batch))
        loss = F.cross_entropy(out.logits, batch["targets"]) + model.config.router_aux_loss_coef * out.aux_loss
        named = dict(model.named_parameters())
        expected.update(zip(named, torch.autograd.grad(loss, named.values()), strict=True))
        batches.append(batch)
        return next_token_loss(model, batch)

    monkeypatch.setattr(train_full_sft, "next_token_loss", plain)
    got = gradients(lab(), monkeypatch, use_moe=1, batch_size=4, accumulation_steps=1)
    assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert got["model.layers.0.mlp.gate.weight"].norm() > 0
    assert len(set(batches[0]["logits_indices"].div(64, rounding_mode="floor").bincount().tolist())) > 1  # unequal rows


def test_a_gradient_is_clipped_to_its_largest_norm_and_logged_as_it_was(lab, monkeypatch):
    whole, clipped = gradients(lab("whole"), monkeypatch), gradients(lab("clipped"), monkeypatch, grad_clip=0.5)
    norm = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    assert norm > 0.5 and lab("clipped").log("full_sft_64")[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert_close(clipped, {name: gradient * 0.5 / norm for name, gradient in whole.items()}, rtol=1e-4, atol=1e-8)


def test_a_mean_counts_once_whatever_the_number_of_micro_steps(lab, monkeypatch):
    def only_a_mean(model, batch):
        weight = model.model.norm.weight
        return Loss(0 * weight.sum(), weight.sum())

    monkeypatch.setattr(train_full_sft, "next_token_loss", only_a_mean)
    for accumulation in (1, 4):
        got = gradients(lab(), monkeypatch, accumulation_steps=accumulation)
        assert_close(got["model.norm.weight"], torch.ones(64))


def test_the_balancing_loss_has_its_coefficient_and_a_dense_model_has_none():
    moe = small_model(use_moe=True, router_aux_loss_coef=0.25)
    assert aux_loss_term(moe, torch.tensor(2.0)) == 0.5
    assert aux_loss_term(small_model(), None) is None


@pytest.mark.parametrize("rows, micro_steps", [(4, 1), (2, 4)], ids=["whole", "accumulated"])
def test_two_ranks_are_one_rank(lab, rows, micro_steps):
    flags = {"stage": train_full_sft, "batch_size": rows, "global_batch_size": rows * micro_steps, "max_steps": 3,
             "learning_rate": 1e-3, "val_data_path": lab().data / "sft.jsonl"}
    process = lab("two").start(
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), **flags)
    lab("one").train(**flags)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and "on 2 x cpu" in out, err
    for one, two in zip(lab("one").log("full_sft_64"), lab("two").log("full_sft_64"), strict=True):
        assert_close(two, one, rtol=0, atol=1e-5)
    assert_close(lab("two").state("full_sft_64")["model"], lab("one").state("full_sft_64")["model"], rtol=0, atol=1e-5)


class Rows:
    """A data set whose batches are the numbers of their rows."""

    row_length, key, loss_count, num_tokens = 4, "rows", np.ones(10), np.ones(10)

    def __len__(self):
        return 10

    def batch(self, rows):
        return rows.tolist()


def row_stream(ranks: int, rank: int = 0, **settings) -> BatchStream:
    args = SimpleNamespace(**{"seed": 3, "batch_size": 2, "accumulation_steps": 4, "global_batch_size": None,
                              "epochs": 4, "packing": 1, **settings})
    return BatchStream(Rows(), args, World(rank, ranks))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(ranks):
    for step in range(5):
        shares = [list(row_stream(ranks, rank, global_batch_size=8).next_batch(step).micro_batches)
                  for rank in range(ranks)]
        assert [len(share) for share in shares] == [4 // ranks] * ranks
        together = [row for micro_step in zip(*shares, strict=True) for batch in micro_step for row in batch]
        assert together == row_stream(1).rows(step).tolist()


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own():
    stream = row_stream(1)
    rows = np.concatenate([stream.rows(step) for step in range(stream.steps)])
    epochs = rows.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (row_stream(1).rows(3) == rows[24:32]).all()  # and needs no memory of the steps before
    assert (row_stream(1, seed=4).rows(0) != rows[:8]).any()
    half = row_stream(1, epochs=0.5)
    assert half.steps == -(-stream.steps // 8) and half.epoch(half.steps) == 0.5


def test_rows_that_ranks_cannot_share_evenly_are_a_mistake():
    with pytest.raises(UserError, match="--global_batch_size 8 .* 3 ranks; 6 can"):
        row_stream(3, global_batch_size=8)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_without_a_global_batch_size_each_device_takes_batch_size_rows_in_each_micro_step(ranks):
    for rank in range(ranks):
        stream = row_stream(ranks, rank)
        assert stream.rows_per_step == 8 * ranks
        assert list(map(len, stream.next_batch(0).micro_batches)) == [2] * 4


@pytest.mark.parametrize("ranks, kept", [(1, None), (2, 8), (4, 8), (3, UserError)])
def test_a_resume_keeps_the_rows_of_a_step_on_another_number_of_ranks(tmp_path, ranks, kept, capsys):
    path = tmp_path / "pretrain_64_resume.pth"
    save_resume(path, {"settings": {"global_batch_size": 8}, "random": [None]})
    run = Run(SimpleNamespace(global_batch_size=None))
    run.world = World(0, ranks)
    if kept is UserError:
        with pytest.raises(UserError, match="8 rows per step, which 3 ranks cannot share"):
            run._keep_global_batch_size(path)
        return
    run._keep_global_batch_size(path)
    assert run.args.global_batch_size == kept
    assert ("8 rows per step, as before on 1 ranks" in capsys.readouterr().out) == (kept is not None)


@pytest.mark.parametrize("rows, ranks, expected", [
    (1, 1, (1, 1)), (15, 1, (1, 1)), (91, 1, (4, 1)), (91, 2, (2, 1)), (50, 4, (1, 1)), (640, 1, (32, 1)),
    (2_000, 1, (32, 3)), (5_120, 1, (32, 8)), (10**6, 1, (32, 8))])
def test_an_epoch_of_a_small_file_has_twenty_steps_where_it_has_as_many_rows(rows, ranks, expected):
    assert adapt_batch(rows, 32, 8, ranks) == expected
    assert rows / (math.prod(expected) * ranks) >= min(20, rows) or rows < 20 * ranks


def test_small_data_is_told_and_flags_that_are_given_win(lab, data, tmp_path, capsys):
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join((data / "sft.jsonl").read_text().splitlines()[:25]))
    flags = {"stage": train_full_sft, "data_path": path, "packing": 0, "max_steps": 1}
    with mock.patch.dict(FLAGS):
        del FLAGS["batch_size"], FLAGS["accumulation_steps"]
        lab("small").train(**flags)
    out = capsys.readouterr().out
    assert "25 rows are few, so that a step takes 1 of them instead of 16" in out
    assert "steps 0 to 1 of 50, 1 rows a step" in out
    lab("given").train(**flags, batch_size=32)
    out = capsys.readouterr().out
    assert "25 documents fill 25 rows, so that there are only 1 steps; lower --batch_size or raise --epochs" in out
    assert "2.00/2 step 1/1" in out and "are few" not in out  # not 2.56/2


def test_micro_batches_are_never_larger_than_batch_size():
    for batch_size, accumulation, ranks in itertools.product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4)):
        if batch_size * accumulation % ranks == 0:
            stream = row_stream(ranks, batch_size=batch_size, global_batch_size=batch_size * accumulation)
            assert max(map(len, stream.next_batch(0).micro_batches)) <= batch_size


# -- the optimizers ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_to_its_peak_and_ends_at_a_tenth():
    rates = [learning_rate(step, 100, 3.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.3 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(3.0) and max(rates) == pytest.approx(3.0)
    assert rates[54] == pytest.approx(3.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * 44 / 89))))
    assert all(a > b for a, b in itertools.pairwise(rates[10:])) and rates[-1] == pytest.approx(0.3, abs=1e-12)
    assert learning_rate(0, 1, 3.0, 1) == 3.0


def test_the_learning_rate_may_stay_and_fall_in_a_line_to_zero():
    rates = [learning_rate(step, 110, 3.0, 10, "wsd") for step in range(110)]
    assert rates[:11] == pytest.approx([*(0.3 * (step + 1) for step in range(10)), 3.0]) and set(rates[10:91]) == {3.0}
    assert rates[90:] == pytest.approx([3.0 * (110 - step) / 20 for step in range(90, 110)])
    assert learning_rate(0, 1, 3.0, 1, "wsd") == 3.0
    # online RL learns from all of its last rollout, also after the last step
    assert learning_rate(112, 110, 3.0, 10, "wsd") == learning_rate(5, 4, 3.0, 4, "wsd") == 0


def test_a_run_takes_its_schedule_from_the_flag_and_keeps_it(lab, capsys):
    lab = lab()
    lab.train(epochs=6, learning_rate=1e-3, lr_schedule="wsd")
    rates = [row["lr"] for row in lab.log()]
    assert rates == pytest.approx([learning_rate(step, len(rates), 1e-3, 0, "wsd") for step in range(len(rates))])
    assert rates[-1] < rates[0]
    lab.fails(capsys, 2, "--lr_schedule cosine", "wsd", epochs=7, learning_rate=1e-3, from_resume=1)


def test_the_log_tells_the_learning_rate_that_every_optimizer_used(lab, monkeypatch):
    lab, used = lab(), []

    def spied_on(*request, **options):
        optimizers = make_optimizers(*request, **options)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda self, *_: used.append([group["lr"] for group in self.param_groups]))
        return optimizers

    monkeypatch.setattr(loop, "make_optimizers", spied_on)
    lab.train(optimizer="muon", epochs=1, learning_rate=1e-3, warmup_ratio=0.5)
    steps = len(lab.log())
    rates = [learning_rate(step, steps, 1e-3, math.ceil(steps / 2)) for step in range(steps)]
    assert [row["lr"] for row in lab.log()] == pytest.approx(rates, rel=1e-5)
    assert used == [[rate] * groups for rate in rates for groups in (2, 1)]  # AdamW's, then Muon's


def test_adamw_is_the_equation_and_decays_matrices_only():
    model = small_model(use_moe=True)
    optimizer, = make_optimizers(model, "adamw", 1e-2, 0.1)
    assert all(group["fused"] for group in optimizer.param_groups)
    names = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    expected = {name: p.detach().clone() for name, p in names.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in names.items()} for _ in range(2))
    for step in range(1, 4):
        for name, p in names.items():
            p.grad = g = torch.randn_like(p)
            decay = 0.0 if name.endswith("norm.weight") else 0.1
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            update = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - 1e-2 * decay) - 1e-2 * update
        optimizer.step()
    assert_close(dict(model.state_dict()) | expected, dict(model.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_moe, feed_forward", [
    (False, ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]),
    (True, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
], ids=["dense", "moe"])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(use_moe, feed_forward):
    model = small_model(use_moe=use_moe)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = (sorted(names[id(p)] for group in optimizer.param_groups for p in group["params"])
                   for optimizer in make_optimizers(model, "muon", 1e-2, 0.1))
    matrices = [f"self_attn.{letter}_proj.weight" for letter in "qkvo"] + feed_forward
    assert muon == sorted(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in matrices)
    assert sorted(adamw + muon) == sorted(names.values())


@pytest.mark.parametrize("shape", [(3, 32, 48), (3, 64, 16)], ids=["wide", "tall"])
def test_muon_is_the_one_of_torch_and_takes_stacks(shape):
    stack = nn.Parameter(torch.randn(shape))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    before, settings = stack.detach().clone(), {"lr": 0.1, "weight_decay": 0.2}
    ours, theirs = Muon([stack], **settings), torch.optim.Muon(alone, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(shape)
        for matrix, gradient in zip(alone, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step(), theirs.step()
    moved, expected = stack.detach() - before, torch.stack([m.detach() for m in alone]) - before
    assert (moved - expected).norm() < 0.02 * expected.norm()  # both work in bf16


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("use_moe", [0, 1], ids=["dense", "moe"])
def test_the_loss_goes_down(lab, optimizer, use_moe):
    lab = lab()
    lab.train(optimizer=optimizer, use_moe=use_moe, learning_rate=3e-3, epochs=3)
    losses = lab.losses("pretrain_64_moe" if use_moe else "pretrain_64")
    assert losses[0] == pytest.approx(math.log(6400), abs=0.3) and losses[-1] < losses[0] - 2


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_a_weight_is_a_plain_half_precision_dict_with_its_card(lab):
    lab = lab()
    lab.train(max_steps=2)
    state, trained = lab.weight(), lab.state()["model"]
    assert type(state) is dict and state.keys() == trained.keys() == small_model().state_dict().keys()
    assert all(value.dtype == torch.float16 for value in state.values())
    assert_close(state, {name: value.half() for name, value in trained.items()}, rtol=0, atol=0)
    card = lab.card()
    assert {**card["config"], **SMALL} == card["config"] and card["tokenizer"] == TOKENIZER.hash
    assert card["parent"] == "none" and card["flags"]["batch_size"] == 2 and card["step"] == 2
    assert card["metrics"]["loss"] == pytest.approx(lab.losses()[-1], rel=1e-5)
    assert card["tokens_seen"] == lab.log()[-1]["tokens"] > 0

    lab.train(train_full_sft, max_steps=1, learning_rate=0, from_weight="pretrain")
    assert lab.card("full_sft_64")["parent"] == "pretrain"
    assert_close(lab.weight("full_sft_64"), state, rtol=0, atol=0)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_a_weight_without_a_card_tells_its_sizes_itself(tmp_path, use_moe):
    other = {"norm_topk_prob": True, "intermediate_size": 96, "num_key_value_heads": 2, "num_experts": 3}
    model = small_model(use_moe=use_moe, **other)
    path = save_weight(model, "published", tmp_path, TOKENIZER)
    path.with_suffix(".json").unlink()
    loaded, card = load_weight("published", tmp_path, tokenizer=TOKENIZER)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "use_moe",
             "vocab_size", "intermediate_size", "norm_topk_prob") + ("moe_intermediate_size", "num_experts") * use_moe
    assert card == {} and all(getattr(loaded.config, name) == getattr(model.config, name) for name in sizes)
    ids = torch.randint(6400, (1, 12))
    assert_close(loaded(ids).logits, model.half().float()(ids).logits)


def test_a_published_weight_with_names_an_expert_loads(tmp_path):
    model = small_model(use_moe=True, norm_topk_prob=True)
    state = model.state_dict()
    for name in [name for name in state if name.endswith("gate_up_proj")]:
        prefix, stacked, down = name.removesuffix("gate_up_proj"), state.pop(name), name.replace("gate_up", "down")
        for number, (gate_up, back) in enumerate(zip(stacked, state.pop(down), strict=True)):
            gate, up = gate_up.chunk(2)
            state |= {f"{prefix}{number}.{part}_proj.weight": value.clone()
                      for part, value in (("gate", gate), ("up", up), ("down", back))}
    torch.save(state, tmp_path / "full_sft_64_moe.pth")
    loaded, _ = load_weight("full_sft", tmp_path)
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_of_several_weights_of_one_name_the_published_default_is_taken(tmp_path, capsys):
    for options in ({}, {"use_moe": True}, {"hidden_size": 32}):
        save_weight(small_model(**options), "pretrain", tmp_path, TOKENIZER)
    save_weight(small_model(), "pretrain_best", tmp_path, TOKENIZER)
    with pytest.raises(UserError, match="pretrain_32, pretrain_64, pretrain_64_moe; choose with --hidden_size"):
        find_weight("pretrain", tmp_path)
    assert find_weight("pretrain", tmp_path, hidden_size=32).stem == "pretrain_32"
    assert find_weight("pretrain", tmp_path, use_moe=True).stem == "pretrain_64_moe"
    assert find_weight("pretrain", tmp_path, 64, False).stem == "pretrain_64"
    assert find_weight("pretrain_best", tmp_path).stem == "pretrain_best_64"
    assert not capsys.readouterr().err
    assert find_weight("pretrain", tmp_path, hidden_size=64).stem == "pretrain_64"
    assert capsys.readouterr().err.startswith("pretrain_64 is taken of pretrain_64, pretrain_64_moe; --hidden_size")
    for stem in ("pretrain_768", "pretrain_768_moe"):
        shutil.copy(tmp_path / "pretrain_64.pth", tmp_path / f"{stem}.pth")
    assert find_weight("pretrain", tmp_path).stem == "pretrain_768"
    assert "pretrain_768 is taken of pretrain_32, pretrain_64" in capsys.readouterr().err
    assert find_weight("pretrain", tmp_path, use_moe=True).stem == "pretrain_768_moe"
    for name in ("pretrain_64_moe", "pretrain_64_moe.pth", str(tmp_path / "pretrain_64_moe.pth")):
        assert find_weight(name, tmp_path) == tmp_path / "pretrain_64_moe.pth"
    for name in ("elsewhere.pth", "pretrain_512", "pre*"):
        with pytest.raises(UserError, match="no such file|no weight"):
            find_weight(name, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no weight", None], ids=["empty", "text", "tensor"])
def test_a_file_that_is_no_weight_is_a_mistake(tmp_path, content):
    path = tmp_path / "pretrain_64.pth"
    path.write_bytes(content) if content is not None else torch.save(torch.ones(3), path)
    with pytest.raises(UserError, match=r"pretrain_64.pth: not a weight file"):
        load_weight("pretrain", tmp_path)


# -- what a run says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [0, 1])
def test_validation_is_the_plain_mean_over_tokens_and_bits_over_bytes(lab, data, packing):
    lab = lab()
    lab.train(max_steps=2, learning_rate=1e-2, val_data_path=data / "pretrain_val.jsonl", packing=packing)
    model, nats, text_nats, tokens, size = small_model(), 0.0, 0.0, 0, 0
    model.load_state_dict(lab.state()["model"])
    for line in (data / "pretrain_val.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([BOS, *TOKENIZER.encode_text(text), EOS])
        each = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none").detach()
        nats, tokens = nats + float(each.sum()), tokens + len(each)
        text_nats, size = text_nats + float(each[:-1].sum()), size + len(text.encode())
    row = lab.log()[-1]
    assert row["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert row["val_bpb"] == pytest.approx(text_nats / math.log(2) / size, rel=1e-5)


def test_steps_that_learn_nothing_are_counted(lab, monkeypatch, capsys):
    lab, calls = lab(), itertools.count()

    def sometimes_zero(model, batch):
        return Loss(next_token_loss(model, batch).loss_sum * (next(calls) // 2 % 2))  # in every other step of two

    monkeypatch.setattr(train_pretrain, "next_token_loss", sometimes_zero)
    monkeypatch.setattr(BatchStream, "next_batch", lambda stream, step, original=BatchStream.next_batch: (
        batch := original(stream, step))._replace(num_items=batch.num_items * (step != 3)))
    lab.train(max_steps=4, log_interval=4)
    assert "no supervised token in 1 of 4 steps · a gradient of exactly 0 in 2 of 4 steps" in capsys.readouterr().out
    assert (lab.log()[-1]["empty_steps"], lab.log()[-1]["zero_grad_steps"]) == (1, 2)


def test_a_place_that_cannot_be_written_is_told_before_training(lab, capsys):
    lab = lab()
    lab.checkpoints.parent.mkdir(parents=True)
    lab.checkpoints.touch()
    lab.fails(capsys, 1, "checkpoints", "exists", max_steps=1)


def test_the_best_weights_are_those_of_the_lowest_val_loss_saved_or_not(lab, data, monkeypatch):
    lab, val_losses = lab(), iter([math.nan, 1.0, 2.0, 1.5])
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda _: {"val_loss": next(val_losses), "val_bpb": 0.0})
    flags = {"val_data_path": data / "pretrain_val.jsonl", "learning_rate": 1e-2}
    lab.train(**flags, max_steps=3, eval_interval=1)
    lab.train(**flags, max_steps=4, from_resume=1)
    best, last = lab.weight("pretrain_best_64"), lab.weight()
    assert lab.card("pretrain_best_64")["step"] == 2 and lab.card()["step"] == 4
    assert lab.card("pretrain_best_64")["metrics"]["val_loss"] == lab.state()["best"] == 1.0
    monkeypatch.undo()
    lab.train(**flags, max_steps=2)
    assert_close(lab.weight(), best, rtol=0, atol=0)
    assert not torch.equal(last["lm_head.weight"], best["lm_head.weight"])


def test_a_validation_between_two_log_lines_loses_no_step_of_the_loss(lab, data):
    lab = lab()
    lab.train(max_steps=4)
    each = lab.losses()
    lab.train(max_steps=4, log_interval=4, eval_interval=2, val_data_path=data / "pretrain_val.jsonl")
    assert [row["step"] for row in lab.log()] == [2, 4] and len(each) == 4
    assert min(each[:2]) <= lab.losses()[0] <= max(each[:2])
    assert min(each[2:]) <= lab.losses()[1] <= max(each[2:])


def test_speed_counts_real_tokens_only(lab, data, monkeypatch):
    lab, clock = lab(), itertools.count()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))  # each look takes a second
    lab.train(epochs=1, packing=0, batch_size=20)
    row = json.loads((lab.out / "logs" / "pretrain_64.jsonl").read_text())
    texts = [json.loads(line)["text"] for line in (data / "pretrain.jsonl").read_text().splitlines()]
    tokens = sum(len(TOKENIZER.encode_text(text)) + 1 for text in texts)  # all that have a next one
    assert row["tokens_per_s"] == row["tokens"] == tokens < 40 * 64


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_the_work_of_a_token_is_counted_by_hand(use_moe):
    model = small_model(use_moe=use_moe, intermediate_size=96, num_key_value_heads=2)
    attention = 64 * (64 + 2 * 16 + 64)  # q, k and v, o
    feed_forward = 3 * 64 * 96 + 4 * 64 * use_moe  # one expert, and the router
    weights = 6400 * 64 + 2 * (attention + feed_forward)
    scores = 2 * 2 * 8 * 8 * 100  # q·k and weights·v over 100 positions, in 2 layers of 8 heads of 8
    assert flops_per_token(model, 100) == 3 * (2 * weights + scores)
    head = 6400 * 64  # the critic has one number as its head instead, and the embedding is no product
    assert flops_per_token(ActorCritic(model), 100) == 3 * (2 * (2 * weights - head + 64) + 2 * scores)


# -- the tracker -------------------------------------------------------------------------------------------------------


class SwanLab:
    """A stand-in for the package that fails where it is told to."""

    def __init__(self, *failing: str):
        self.failing, self.rows, self.options = failing, [], {}
        self.id, self.finished = "the-run-id", False

    def _fail(self, name: str) -> None:
        if name in self.failing:
            raise RuntimeError(f"{name} failed\nat length")

    def init(self, **options):
        self._fail("init")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the real one does, in its way
        self.options = options
        return self

    def log(self, row, step):
        self._fail("log")
        self.rows.append((step, row))

    def finish(self):
        self._fail("finish")
        self.finished = True


@pytest.mark.parametrize("failing", [("init",), ("log",), ("finish",)])
def test_a_tracker_that_fails_never_stops_a_run(lab, monkeypatch, capsys, failing):
    lab = lab()
    monkeypatch.setitem(sys.modules, "swanlab", SwanLab(*failing))
    lab.train(use_wandb=True, max_steps=3)
    assert len(lab.log()) == 3 and (lab.out / "pretrain_64.pth").exists()
    assert f"{failing[0]} failed" in capsys.readouterr().out


def test_the_tracker_hears_every_line_and_goes_on_with_the_same_run(lab, monkeypatch):
    lab, first, second = lab(), SwanLab(), SwanLab()
    on_interrupt = []
    monkeypatch.setitem(sys.modules, "swanlab", first)
    monkeypatch.setattr(loop, "learning_rate", lambda *schedule: (
        on_interrupt.append(signal.getsignal(signal.SIGINT)), learning_rate(*schedule))[1])
    lab.train(use_wandb=True, max_steps=2)
    assert [step for step, _ in first.rows] == [1, 2] and first.finished
    assert first.rows[0][1]["loss"] == pytest.approx(lab.losses()[0], rel=1e-5)
    assert lab.state()["tracker"] == "the-run-id" and "id" not in first.options
    assert on_interrupt and signal.SIG_IGN not in on_interrupt  # Ctrl-C still stops the run in order
    monkeypatch.setitem(sys.modules, "swanlab", second)
    lab.train(use_wandb=True, max_steps=3, from_resume=1)
    assert [step for step, _ in second.rows] == [3]
    assert (second.options["id"], second.options["resume"]) == ("the-run-id", "allow")


def test_swanlab_without_a_key_tracks_offline_and_asks_nothing(lab, monkeypatch, tmp_path, capfd):
    pytest.importorskip("swanlab")
    lab = lab()
    for name in [name for name in os.environ if name.startswith("SWANLAB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.swanlab
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    lab.train(use_wandb=True, max_steps=2)
    run, = (lab.out / "logs" / "swanlab").glob("run-*")
    assert lab.state()["tracker"] and lab.state()["tracker"] in run.name
    assert "SwanLab cloud failed" in capfd.readouterr().out


# -- compilation -------------------------------------------------------------------------------------------------------


def test_compiled_blocks_train_the_same_and_are_compiled_once(lab, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def counting(model, batch):
        graphs.append(counters["stats"]["unique_graphs"])
        return next_token_loss(model, batch)

    monkeypatch.setattr(train_pretrain, "next_token_loss", counting)
    flags = {"max_steps": 6, "learning_rate": 1e-3}
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):  # plain code: made in half the time
        lab("compiled").train(use_compile=1, **flags)
    if graphs[-1] == 0:
        pytest.skip("no C++ compiler")
    assert graphs[4:] == graphs[4:5] * len(graphs[4:]), graphs
    lab("eager").train(**flags)
    assert_close(lab("compiled").losses(), lab("eager").losses(), rtol=0, atol=1e-4)


def test_a_broken_compiler_is_told_and_training_goes_on(lab, capsys):
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/bin/false",)}):
        lab = lab()
        lab.train(use_compile=1, max_steps=2)
    assert "compile: not possible here" in capsys.readouterr().out and len(lab.losses()) == 2
