"""DPO and the reward model: their rows, their losses against trl's, and the stages as users run them."""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from lab import DEADLINE, TOKENIZER, small_model
from torch.testing import assert_close

from dataset.lm_dataset import DPODataset
from model.model_reward import MiniMindForSequenceClassification, score_conversations
from model.transformers_io import save_folder
from model.weights import load_weight
from trainer import train_dpo, train_reward
from trainer.losses import answer_log_probs, dpo_loss, num_wins, preference_losses, reward_loss

USER, THINKING = {"role": "user", "content": "1 + 2?"}, {"reasoning_content": "1 + 2 = 3"}


pytestmark = pytest.mark.usefixtures("one_thread")


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def dataset(folder, rows: list[dict], max_seq_len: int = 64, **options) -> DPODataset:
    path = folder / "dpo.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DPODataset(path, TOKENIZER, max_seq_len, cache_dir=folder / "cache", **options)


def random_pairs(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    text = [" ".join(rng.choice(["red", "house", "你", "天", "over"], rng.integers(1, 9))) for _ in range(3 * count)]
    return [{"chosen": [USER | {"content": a}, says(b)], "rejected": [USER | {"content": a}, says(c + " no")]}
            for a, b, c in zip(text[::3], text[1::3], text[2::3], strict=True)]


def plain_log_prob(model, messages: list[dict]) -> tuple[torch.Tensor, int]:
    """Σ log p of the last message alone, and its tokens: one conversation, one pass, no packing."""
    ids, mask = TOKENIZER.encode(messages)
    start = len(TOKENIZER.encode(messages[:-1])[0])
    answer = [i for i in range(start, len(ids)) if mask[i]]
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_p[i - 1, ids[i]] for i in answer), len(answer)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_batch_holds_whole_pairs_and_says_which_token_is_whose(tmp_path, packing):
    rows = random_pairs(15)
    data, model = dataset(tmp_path, rows, packing=packing), small_model().requires_grad_(False)
    assert data.loss_count.sum() == 15 and data.row_length == 128
    assert len(data) == 15 if not packing else len(data) < 10 and data.utilization > 0.7
    got, every = {}, np.arange(len(data))
    for wanted in (every[:-3], np.array([*every[-3:], -1])):
        batch = data.batch(wanted)
        log_p, _ = answer_log_probs(model, batch)
        flat, bounds = batch["input_ids"].flatten(), batch["cu_seqlens"].tolist()
        assert (flat[batch["ends"]] == 2).all() and len(batch["ends"]) == 2 * data.loss_count[wanted[wanted >= 0]].sum()
        assert batch["attention_mask"].sum() == data.num_tokens[wanted[wanted >= 0]].sum()
        for document in range(len(batch["ends"])):
            ids = flat[batch["expand_index"][bounds[document]:bounds[document + 1]]]
            got[tuple(ids.tolist()), document % 2] = log_p[document]
    for row in rows:
        for side, name in enumerate(("chosen", "rejected")):
            ids = tuple(TOKENIZER.encode(row[name])[0][:-1])  # the newline after <|im_end|> is no question
            assert_close(got[ids, side], plain_log_prob(model, row[name])[0], rtol=0, atol=1e-4)


def test_only_the_last_answer_is_learned_and_with_it_the_choice_to_think(tmp_path):
    before = [USER, says("3"), USER]
    row = {"chosen": [*before, says("3", **THINKING)], "rejected": [*before, says("4")]}
    both = {"chosen": [*before, says("3")], "rejected": [*before, says("4")]}
    batch, plain = (dataset(tmp_path, [each]).batch(np.array([0])) for each in (row, both))
    sides = [batch["targets"][batch["document"] == side].tolist() for side in (0, 1)]
    texts = [TOKENIZER.decode(ids, keep_special_tokens=True) for ids in sides]
    assert texts == ["<think>\n1 + 2 = 3\n</think>\n\n3<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]
    assert TOKENIZER.decode(plain["targets"].tolist(), keep_special_tokens=True) == "3<|im_end|>4<|im_end|>"


def test_long_sides_are_cut_and_a_pair_without_an_answer_left_is_left_out(tmp_path):
    long = "red house " * 40
    rows = [{"chosen": [USER, says(long)], "rejected": [USER, says("no")]},
            {"chosen": [USER | {"content": long}, says("a")], "rejected": [USER | {"content": long}, says("b")]}]
    data = dataset(tmp_path, rows + random_pairs(3))
    assert data.loss_count.sum() == 4
    assert data.warnings == ["1 of 5 pairs have a side of more than 64 tokens, which is cut; 1 more, whose prompt is "
                           "that long, are left out"]
    with pytest.raises(Exception, match="every prompt fills --max_seq_len 64"):
        dataset(tmp_path, rows[1:])
    equal_pairs = [{"chosen": [USER, says(long)], "rejected": [USER, says(long + "not")]}]
    warning = dataset(tmp_path, equal_pairs + random_pairs(3)).warnings[0]
    assert warning.endswith("; 1 more, whose sides are then equal, are left out")
    with pytest.raises(Exception, match="chosen and rejected are equal up to --max_seq_len 64"):
        dataset(tmp_path, equal_pairs)


def test_a_reward_model_does_not_replace_another_folder(lab, capsys):
    lab = lab().with_base()
    save_folder(small_model(), lab.out / "reward_64", TOKENIZER)
    lab.fails(capsys, 2, "reward_64 holds another model", stage=train_reward, from_weight="full_sft")


@pytest.mark.parametrize("row, words", [
    ({"chosen": [USER, says("3")]}, '{"chosen": [messages], "rejected": [messages]}'),
    ({"chosen": [USER, says("3")], "rejected": [USER | {"content": "2 + 2?"}, says("4")]}, "prompts of chosen and"),
    ({"chosen": [USER, says("3")], "rejected": [USER, says(" ")]}, "rejected: message 2: the answer is empty"),
    ({"chosen": [USER, USER], "rejected": [USER, says("4")]}, "chosen is not a prompt and an answer"),
    ({"chosen": [says("3")], "rejected": [says("4")]}, "chosen: the prompt that it answers is missing"),
    ({"chosen": [USER, says("3")], "rejected": [USER, says("3")]}, "chosen and rejected are equal"),
    ({"chosen": [USER, says("3")], "rejected": [USER, "4"]}, "a message must be an object"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_told_with_its_line(lab, capsys, tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*random_pairs(2), row]))
    lab().with_base().fails(capsys, 2, f"{path}:3:", words, "--skip_bad_rows", stage=train_dpo, from_weight="full_sft",
                            data_path=path)


# -- losses ------------------------------------------------------------------------------------------------------------


def losses_of_trl(kind: str, log_p: torch.Tensor, reference: torch.Tensor, count: torch.Tensor, beta: float) -> float:
    """DPOTrainer's own loss on given Σ log p [2, P], with the model taken out."""
    P, T = log_p.shape[1], int(count.max())
    mask = (torch.arange(T + 1) < count.reshape(-1, 1) + 1) & (torch.arange(T + 1) > 0)  # the first token is a prompt
    each = torch.zeros(2 * P, T)
    each[:, 0] = log_p.flatten()
    other = SimpleNamespace(log_probs=each, entropy=each, mean_logits=each, is_top1=each > 0)
    alone = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    trainer = SimpleNamespace(
        accelerator=alone, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=beta,
        loss_types=[kind], loss_weights=[1.0], f_divergence_type="reverse_kl", label_smoothing=0.0,
        use_weighting=False, _tp_size=1, _total_train_tokens=0, _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True))
    inputs = {"completion_mask": mask.long(), "input_ids": mask.long(), "attention_mask": mask.long(),
              "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}

    DPOTrainer = pytest.importorskip("trl", reason="trl needs python 3.11").DPOTrainer
    return float(DPOTrainer._compute_loss(trainer, lambda **_: other, inputs, False))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_loss_on_given_log_probabilities_is_the_one_of_trl(kind):
    log_p, reference, count = -50 * torch.rand(2, 7), -50 * torch.rand(2, 7), torch.randint(1, 9, (2, 7))
    scores = log_p - reference if kind == "sigmoid" else (log_p - reference) / count
    ours = preference_losses(*scores, kind, beta=0.3).mean()
    assert float(ours) == pytest.approx(losses_of_trl(kind, log_p, reference, count, 0.3), rel=1e-5)


@pytest.mark.parametrize("kind, smoothing", [("sigmoid", 0.2), ("simpo", 0.0), ("simpo", 0.1)])
def test_smoothing_and_simpo_are_those_of_trl(kind, smoothing):
    chosen, rejected = -3 * torch.rand(2, 7)
    trainer = SimpleNamespace(loss_type=kind, alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing,
                              accelerator=SimpleNamespace(device="cpu"))
    CPOTrainer = pytest.importorskip("trl.experimental.cpo", reason="trl needs python 3.11").CPOTrainer
    theirs, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    assert_close(preference_losses(chosen, rejected, kind, 2.0, smoothing, 0.7), theirs)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "simpo"])
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_pairs_alone(tmp_path, kind):
    rows, model = random_pairs(6), small_model()
    data = dataset(tmp_path, rows)
    data.ref_logprobs = -30 * torch.rand(12)
    wanted = np.arange(len(data))
    loss = dpo_loss(model, data.batch(wanted), kind, 0.5, 0.1, 0.2)
    loss.loss_sum.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain, ends = 0, np.load(data.folder / "ends.npy")
    position = {start: i for i, start in enumerate(data.rows.start.tolist())}  # of a document, in the order of the rows
    for number, row in enumerate(rows):
        score = []
        for side, name in enumerate(("chosen", "rejected")):
            log_p, count = plain_log_prob(model, row[name])
            document = 2 * number + side
            reference = data.ref_logprobs[position[int(ends[document - 1]) if document else 0]]
            score.append((log_p - (reference if kind != "simpo" else 0)) / (count if kind != "sigmoid" else 1))
        plain = plain + preference_losses(*score, kind, 0.5, 0.1, 0.2)
    plain.backward()
    assert_close(loss.loss_sum, plain, rtol=1e-4, atol=1e-4)
    assert_close(got, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-3, atol=1e-4)


def test_a_tie_is_half_a_win():
    assert num_wins(torch.tensor([1.0, -2.0, 0.0, 3.0])) == 2.5


def test_a_reward_is_read_at_the_end_of_the_answer_and_compared_in_pairs(tmp_path):
    rows, model = random_pairs(6), MiniMindForSequenceClassification.from_decoder(small_model())
    data = dataset(tmp_path, rows)
    loss = reward_loss(model, data.batch(np.arange(len(data))))
    assert loss.loss_sum.item() == pytest.approx(6 * math.log(2), rel=1e-6)
    torch.nn.init.normal_(model.score.weight)
    loss = reward_loss(model, data.batch(np.arange(len(data))))
    reward = [score_conversations(model, [TOKENIZER.encode(row[side])[0][:-1] for row in rows], 4)
              for side in ("chosen", "rejected")]
    assert loss.loss_sum.item() == pytest.approx(float(-F.logsigmoid(reward[0] - reward[1]).sum()), rel=1e-4)
    assert float(loss.metrics["accuracy"]) == float((reward[0] > reward[1]).sum())


def test_the_sum_of_what_each_token_is_given_is_compared_as_well(tmp_path):
    rows, model = random_pairs(6), MiniMindForSequenceClassification.from_decoder(small_model())
    torch.nn.init.normal_(model.score.weight)
    data = dataset(tmp_path, rows)
    batch = data.batch(np.arange(len(data)))
    sums = []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids, mask = TOKENIZER.encode(row[side])
            start = len(TOKENIZER.encode(row[side][:-1])[0])
            sums.append(score_conversations(model, [ids[:i + 1] for i in range(start, len(ids)) if mask[i]]).sum())
    chosen, rejected = torch.stack(sums).view(2, -1)
    added = reward_loss(model, batch, 0.5).loss_sum - reward_loss(model, batch).loss_sum
    assert_close(added, -0.5 * F.logsigmoid(chosen - rejected).sum(), rtol=1e-4, atol=1e-4)


def test_extra_layers_are_copies_of_the_first_above_the_others():
    decoder = small_model()
    model = MiniMindForSequenceClassification.from_decoder(decoder, 1)
    assert model.config.num_hidden_layers == decoder.config.num_hidden_layers + 1 == len(model.model.layers)
    for layer, copied in zip(model.model.layers, [*decoder.model.layers, decoder.model.layers[0]], strict=True):
        assert_close(layer.state_dict(), copied.state_dict(), rtol=0, atol=0)
    assert_close(model.model.norm.weight, decoder.model.norm.weight, rtol=0, atol=0)


# -- stages ------------------------------------------------------------------------------------------------------------

DPO = {"stage": train_dpo, "from_weight": "full_sft"}


def with_base(place, **options):
    torch.manual_seed(1)
    return place.with_base(**options)


@pytest.mark.parametrize("kind, start", [("sigmoid", math.log(2)), ("ipo", 25.0)])
def test_training_starts_at_the_reference_and_learns_to_prefer(lab, data, kind, start):
    lab = with_base(lab())
    flags = {**DPO, "loss_type": kind, "beta": 0.1, "learning_rate": 3e-3, "epochs": 4}
    lab.train(**flags, val_data_path=data / "dpo.jsonl")
    log = lab.log("dpo_64")
    assert log[0]["loss"] == pytest.approx(start, rel=1e-4) and abs(log[0]["margin"]) < 1e-3
    assert log[-1]["loss"] < 0.8 * start and log[-1]["accuracy"] > 0.9 and log[-1]["val_accuracy"] > 0.9
    assert log[-1]["val_loss"] < 0.8 * start and log[-1]["chosen_logp"] < 0


def test_the_reference_is_computed_once_and_in_the_weights_it_started_from(lab, data, monkeypatch, capsys):
    lab = with_base(lab())
    flags = {**DPO, "max_steps": 2, "learning_rate": 1e-3, "cache_dir": lab.out / "cache"}
    lab.train(**flags)
    first = lab.losses("dpo_64")
    assert capsys.readouterr().out.count("reference:") == 1
    monkeypatch.setattr(train_dpo, "answer_log_probs", lambda *_: pytest.fail("computed again"))
    lab.train(**flags)
    assert lab.losses("dpo_64") == first


@pytest.mark.parametrize("stage, name", [(train_dpo, "dpo"), (train_reward, "reward")])
def test_a_resumed_run_ends_as_the_whole_one_to_the_bit(lab, data, stage, name):
    whole, parts = with_base(lab("whole")), with_base(lab("parts"))
    flags = {"stage": stage, "from_weight": "full_sft", "epochs": 1, "val_data_path": data / "dpo.jsonl",
             "eval_interval": 2, "learning_rate": 1e-3}
    whole.train(**flags)
    parts.train(**flags, max_steps=2)
    parts.train(**flags, from_resume=1)
    assert parts.ended_like(whole, f"{name}_64")


@pytest.mark.parametrize("stage, name", [(train_dpo, "dpo"), (train_reward, "reward")])
def test_two_ranks_are_one_rank(lab, data, stage, name):
    for place in ("one", "two"):
        with_base(lab(place))
    flags = {"stage": stage, "from_weight": "full_sft", "global_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3,
             "val_data_path": data / "dpo.jsonl"}
    process = lab("two").start(
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), **flags)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and "on 2 x cpu" in out, err
    lab("one").train(**flags)
    for one, two in zip(lab("one").log(f"{name}_64"), lab("two").log(f"{name}_64"), strict=True):
        assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert_close(lab("two").state(f"{name}_64")["model"], lab("one").state(f"{name}_64")["model"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_a_reward_model_learns_and_transformers_gives_the_same_rewards(lab, data, use_moe):
    lab = with_base(lab(), use_moe=use_moe)
    stem = "reward_64" + "_moe" * use_moe
    lab.train(train_reward, from_weight="full_sft", learning_rate=3e-3, epochs=4, val_data_path=data / "dpo.jsonl",
              extra_layers=1, token_weight=0.5)
    log = lab.log(stem)
    assert log[-1]["val_accuracy"] > 0.9 and log[-1]["val_loss"] < 0.5
    ours, _ = load_weight("reward", lab.out, model_class=MiniMindForSequenceClassification)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(lab.out / stem, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.out / stem)
    conversations = [json.loads(line)["chosen"] for line in (data / "dpo.jsonl").read_text().splitlines()[:5]]
    ids = [TOKENIZER.encode(messages)[0][:-1] for messages in conversations]
    padded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    scores = theirs.eval()(**padded).logits[:, 0].detach()
    assert_close(score_conversations(ours.eval(), ids), scores, rtol=0.01, atol=0.01)  # ours: half precision
    ours.load_state_dict(theirs.state_dict())
    assert_close(score_conversations(ours, ids), scores, rtol=1e-4, atol=1e-4)


def test_a_beta_of_zero_and_a_reward_model_that_should_talk_are_mistakes(lab, capsys):
    lab = with_base(lab())
    lab.fails(capsys, 2, "--beta 0", **DPO, beta=0)
    lab.fails(capsys, 2, "--label_smoothing", "ipo", **DPO, loss_type="ipo", label_smoothing=0.1)
    lab.fails(capsys, 2, "--extra_layers 9", **DPO | {"stage": train_reward}, extra_layers=9)
    lab.train(train_reward, from_weight="full_sft", max_steps=1)
    capsys.readouterr()
    lab.fails(capsys, 2, "reward_64.pth", "reward model", **DPO | {"from_weight": "reward"})
