"""LoRA against peft on transformers' own models, and as users run it: trained, attached, merged, refused."""

import json
import sys
from unittest import mock

import peft
import pytest
import torch
import transformers
from lab import DEADLINE, TOKENIZER, small_model
from torch.testing import assert_close

from model import loading
from model.cli import UserError, run_main
from model.loading import load_for_inference
from model.model_lora import (
    LoRAConfig,
    apply_lora,
    find_target_modules,
    load_lora,
    lora_state,
    merge_lora,
    read_lora,
    save_lora,
)
from model.transformers_io import qwen3_config
from model.weights import load_weight, save_weight, weights_hash
from scripts import convert_model
from trainer import train_lora
from trainer import trainer as loop
from trainer.optimizer import make_optimizers

DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STACKS = ("gate_up_proj", "down_proj")
kinds = pytest.mark.parametrize("options, targets", [
    ({}, DENSE), ({}, ("v_proj", "down_proj")), ({"use_moe": True}, ("q_proj", "gate", *STACKS)),
    ({"use_moe": True, "num_experts_per_tok": 2}, ("down_proj",)),
], ids=["dense", "dense-some", "moe", "moe-one-stack"])


def large_weights(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model


def saved_pair(folder, options: dict, targets: tuple, name: str = "lora", **settings):
    """A base and a LoRA of it with adapters far from zero, saved in `folder` → the base as loaded."""
    if not (folder / f"full_sft_64{'_moe' if options else ''}.pth").exists():
        save_weight(large_weights(small_model(**options)), "full_sft", folder, TOKENIZER)
    base, _ = load_weight("full_sft", folder, **options)
    lora = LoRAConfig(**{"rank": 8, "alpha": 12.0, "targets": targets, "base": weights_hash(base), **settings})
    adapted, _ = load_weight("full_sft", folder, **options)
    apply_lora(adapted, lora)
    for value in lora_state(adapted).values():
        torch.nn.init.normal_(value, std=0.1)
    save_lora(adapted, name, folder, TOKENIZER, lora)
    return base


def convert(*flags: object) -> None:
    with mock.patch.object(sys, "argv", ["convert_model.py", *map(str, flags)]):
        run_main(convert_model.main)


def to_peft(lora, folder) -> None:
    convert("--source", lora, "--target", folder, "--format", "peft")


def from_peft(folder, base, lora) -> None:
    convert("--source", base, "--lora", folder, "--target", lora, "--format", "lora")


@kinds
def test_outputs_and_gradients_equal_peft(tmp_path, options, targets):
    base, ids = saved_pair(tmp_path, options, targets), torch.randint(3, 6400, (2, 16))
    ours, _ = load_weight("full_sft", tmp_path, **options)
    load_lora(ours, "lora", tmp_path)
    to_peft(tmp_path / f"lora_64{'_moe' * bool(options)}.pth", tmp_path / "peft")
    qwen3 = transformers.Qwen3MoeForCausalLM if options else transformers.Qwen3ForCausalLM
    theirs = qwen3(qwen3_config(base.config))
    theirs.load_state_dict(base.state_dict())
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft", is_trainable=True)
    outputs = [model(ids).logits for model in (ours, theirs)]
    assert (outputs[0] - base(ids).logits).abs().max() > 0.1  # the adapters matter
    assert_close(*outputs, rtol=0, atol=1e-5)
    direction = torch.randn_like(outputs[0]) / outputs[0].numel() ** 0.5
    for output in outputs:
        output.backward(direction)
    stacks = [name for name in STACKS if options and name in targets]
    seen = dict(theirs.named_parameters())
    assert len(lora_state(ours)) == sum(p.requires_grad for p in seen.values()) > 0
    for name, p in lora_state(ours).items():
        other = seen[convert_model.peft_name(name, stacks).replace(".weight", ".default.weight")]
        assert_close(convert_model.to_peft_layout(name, p.grad), other.grad, rtol=1e-4, atol=1e-5)


@kinds
def test_a_peft_adapter_comes_back_to_the_bit(tmp_path, options, targets):
    saved_pair(tmp_path, options, targets, dropout=0.0)
    stem = "_64_moe.pth" if options else "_64.pth"
    to_peft(tmp_path / f"lora{stem}", tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / f"full_sft{stem}", tmp_path / f"again{stem}")
    (lora, state), (lora2, state2) = (read_lora(tmp_path / f"{name}{stem}") for name in ("lora", "again"))
    assert (lora.rank, lora.alpha, set(lora.targets)) == (lora2.rank, lora2.alpha, set(lora2.targets))
    assert_close(state2, state, rtol=0, atol=0)


@pytest.fixture
def in_fp32(monkeypatch):
    """Inference in full precision, also where the machine is faster in half."""
    monkeypatch.setattr(loading, "inference_dtype", lambda *_: torch.float32)


def test_an_adapter_made_by_peft_is_read(tmp_path, in_fp32):
    base, ids = saved_pair(tmp_path, {}, DENSE), torch.randint(3, 6400, (1, 12))
    theirs = transformers.Qwen3ForCausalLM(qwen3_config(base.config))
    theirs.load_state_dict(base.state_dict())
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": False}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["q_proj", "up_proj"], **settings))
    theirs.save_pretrained(tmp_path / "peft")
    from_peft(tmp_path / "peft", tmp_path / "full_sft_64.pth", tmp_path / "theirs_64.pth")
    ours, _ = load_for_inference("model", "full_sft", tmp_path, None, "cpu", lora_weight="theirs")
    assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-3)  # ours went through half precision


@kinds
def test_merged_weights_equal_attached_adapters(tmp_path, options, targets):
    base, ids = saved_pair(tmp_path, options, targets), torch.randint(3, 6400, (2, 16))
    model, _ = load_weight("full_sft", tmp_path, **options)
    load_lora(model, "lora", tmp_path)
    attached = model(ids).logits
    merge_lora(model)
    assert_close(model(ids).logits, attached, rtol=0, atol=1e-5)
    assert [*model.state_dict()] == [*base.state_dict()] and not (attached - base(ids).logits).allclose(attached * 0)


def test_several_loras_merge_at_given_weights(tmp_path):
    base = saved_pair(tmp_path, {}, ("q_proj", "down_proj"), "a")
    saved_pair(tmp_path, {}, ("q_proj",), "b", alpha=8.0, rank=4)
    loras = [str(tmp_path / "a_64.pth"), f"{tmp_path / 'b_64.pth'}=-0.5"]
    convert("--source", tmp_path / "full_sft_64.pth", "--target", tmp_path / "both_64.pth", "--format", "torch",
            "--lora", *loras)
    name, expected = "model.layers.1.self_attn.q_proj", base.state_dict()
    (_, a), (_, b) = (read_lora(tmp_path / f"{letter}_64.pth") for letter in "ab")
    delta = [state[f"{name}.lora_B"].float() @ state[f"{name}.lora_A"].float() for state in (a, b)]
    merged, card = load_weight("both", tmp_path)
    want = expected[f"{name}.weight"] + 12 / 8 * delta[0] - 0.5 * 8 / 4 * delta[1]
    assert_close(merged.state_dict()[f"{name}.weight"], want, rtol=1e-3, atol=1e-4)
    assert card["merged"] == loras and card["parent"] == "full_sft"


@pytest.mark.parametrize("use_moe", [0, 1], ids=["dense", "moe"])
def test_only_the_adapters_learn_and_only_they_are_saved(lab, monkeypatch, use_moe, in_fp32):
    lab, seen = lab().with_base(use_moe=bool(use_moe)), {}
    stem, options = "lora_identity_64" + "_moe" * use_moe, {"use_moe": bool(use_moe)}

    def record(model, **options):
        seen["optimizers"], seen["model"] = make_optimizers(model, **options), model
        return seen["optimizers"]

    monkeypatch.setattr(loop, "make_optimizers", record)
    lab.train(train_lora, lora_name="lora_identity", from_weight="full_sft", learning_rate=1e-2, epochs=4,
              use_moe=use_moe)
    base, _ = load_weight("full_sft", lab.out, **options)
    num_adapter_parameters = sum(p.numel() for p in lora_state(seen["model"]).values())
    moments = [value for optimizer in seen["optimizers"] for state in optimizer.state.values() for key, value
               in state.items() if key in ("exp_avg", "exp_avg_sq")]
    assert sum(value.numel() for value in moments) == 2 * num_adapter_parameters
    assert num_adapter_parameters < sum(p.numel() for p in base.parameters()) / 2
    trained = seen["model"].state_dict()
    assert all(torch.equal(trained[name], value) for name, value in base.state_dict().items())
    state = lab.weight(stem)
    assert state.pop("settings")["base"] == weights_hash(base)
    assert state.keys() == lora_state(seen["model"]).keys() == lab.state(stem)["model"].keys()
    assert all(value.dtype == torch.float16 for value in state.values())
    assert lab.losses(stem)[-1] < lab.losses(stem)[0] - 0.3
    model, _ = load_for_inference("model", "full_sft", lab.out, None, "cpu", lora_weight="lora_identity", **options)
    ids = torch.randint(3, 6400, (1, 9))
    assert_close(model(ids).logits, seen["model"].eval()(ids).logits, rtol=0, atol=1e-3)


def test_a_lora_run_resumes_to_the_bit_with_dropout_and_muon(lab):
    whole, parts = lab("whole"), lab("parts")
    flags = {"stage": train_lora, "from_weight": "full_sft", "optimizer": "muon", "lora_dropout": 0.2, "epochs": 1,
             "val_data_path": whole.data / "sft.jsonl", "eval_interval": 2}
    for place in (whole, parts):
        torch.manual_seed(1)
        place.with_base()
    whole.train(**flags)
    parts.train(**flags, max_steps=2)
    parts.train(**flags, from_resume=1)
    assert parts.ended_like(whole, "lora_medical_64")


def test_a_lora_of_two_ranks_is_the_one_of_one(lab):
    for name in ("one", "two"):
        torch.manual_seed(1)
        lab(name).with_base()
    flags = {"stage": train_lora, "from_weight": "full_sft", "max_steps": 3, "learning_rate": 1e-2,
             "global_batch_size": 4}
    process = lab("two").start(
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), **flags)
    lab("one").train(**flags)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and "on 2 x cpu" in out, err
    one, two = (lab(name).state("lora_medical_64")["model"] for name in ("one", "two"))
    assert_close(two, one, rtol=0, atol=1e-5)


def test_adapters_can_be_compiled(lab, monkeypatch):
    compile_module = torch.nn.Module.compile  # all of it but the slow C++
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(
        self, backend="aot_eager", **options))
    for name in ("eager", "compiled"):
        torch.manual_seed(1)
        lab(name).with_base()
        lab(name).train(train_lora, from_weight="full_sft", max_steps=3, use_compile=int(name == "compiled"))
    assert_close(lab("compiled").losses("lora_medical_64"), lab("eager").losses("lora_medical_64"), rtol=0, atol=1e-4)


def test_a_run_validates_without_dropout_and_trains_with_it(lab, monkeypatch):
    lab, modes = lab().with_base(), []
    training, validation = train_lora.next_token_loss, loop.text_loss
    monkeypatch.setattr(train_lora, "next_token_loss", lambda model, batch: (
        modes.append(("train", model.training)), training(model, batch))[1])
    monkeypatch.setattr(loop, "text_loss", lambda model, batch, **options: (
        modes.append(("validate", model.training)), validation(model, batch, **options))[1])
    lab.train(train_lora, from_weight="full_sft", max_steps=2, eval_interval=1, val_data_path=lab.data / "sft.jsonl")
    assert set(modes) == {("train", True), ("validate", False)} and modes[-1][0] == "validate"
    assert modes.index(("validate", False)) < max(i for i, (kind, _) in enumerate(modes) if kind == "train")


def test_the_data_follows_the_name(lab, capsys, monkeypatch):
    monkeypatch.setattr(train_lora, "ROOT", lab().data)
    for flags, name in (({}, "lora_medical"), ({"lora_name": "lora_x"}, "lora_x")):
        lab().fails(capsys, 2, str(lab().data / f"dataset/{name}.jsonl"), stage=train_lora, data_path=None, **flags)


def test_dropout_only_acts_in_training(tmp_path):
    saved_pair(tmp_path, {}, DENSE, dropout=0.5)
    model, ids = load_weight("full_sft", tmp_path)[0], torch.randint(3, 6400, (1, 9))
    load_lora(model, "lora", tmp_path)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_errors_are_one_line(lab, capsys, tmp_path):
    lab = lab().with_base()
    flags = {"stage": train_lora, "from_weight": "full_sft", "max_steps": 1}
    lab.fails(capsys, 2, "--lora_targets x_proj", "q_proj", **flags, lora_targets="q_proj,x_proj")
    lab.train(**flags)
    capsys.readouterr()
    lab.fails(capsys, 2, "is a LoRA", "--lora_weight lora_medical", **flags | {"from_weight": "lora_medical"})
    lab.fails(capsys, 2, "--lora_rank 4: ", "resume.pth was made with 16;", **flags, from_resume=1, lora_rank=4)
    with pytest.raises(UserError, match="lora_medical_64.pth was trained on another base"):
        load_lora(small_model(), "lora_medical", lab.out)
    with pytest.raises(UserError, match="no weight lora_medical_32.pth"):
        load_lora(small_model(hidden_size=32), "lora_medical", lab.out)
    with pytest.raises(UserError, match="full_sft_64.pth: not a LoRA file"):
        load_lora(small_model(), "full_sft", lab.out)
    to_peft(lab.out / "lora_medical_64.pth", tmp_path / "adapter")
    with pytest.raises(UserError, match="this model has no module for"):
        convert_model.import_peft(small_model(use_moe=True), tmp_path / "adapter")
    for name, change, message in (("a", {"use_dora": True}, "use_dora"), ("b", {"r": None}, "not a peft adapter"),
                                  ("c", {"alora_invocation_tokens": [50]}, "alora_invocation_tokens"),
                                  ("d", {"init_lora_weights": "pissa"}, "pissa changes the base model")):
        folder = tmp_path / name
        to_peft(lab.out / "lora_medical_64.pth", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            convert_model.import_peft(small_model(), folder)


def test_the_router_is_not_adapted_by_default():
    assert "gate" in find_target_modules(small_model(use_moe=True)) and "gate" not in LoRAConfig.targets
