"""What is chosen for a device, by pretending to have it: precision, compiler, and what to say when it does not work."""

import math
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lab import small_model
from torch._dynamo.utils import counters
from torch.testing import assert_close

from model import device as devices
from model.attention import _mask_for_mps
from model.cli import UserError
from model.device import choose_device, training_dtype
from model.inference import model_runner
from model.inference.engine import Engine
from model.inference.prepacked import prepack
from model.weights import ROOT
from trainer import distributed
from trainer.distributed import World
from trainer.optimizer import make_optimizers, orthogonalise
from trainer.parallel import DDPStrategy
from trainer.rl.advantages import whiten
from trainer.run import Run

CUDA = torch.device("cuda")


@pytest.fixture
def broken_card(monkeypatch):
    """A card that is there, for which this PyTorch has no kernels."""
    def launch(*_, device, **__):
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return torch.zeros(1)

    monkeypatch.setattr(torch, "ones", launch)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_card_without_kernels_is_refused_with_the_build_to_install(broken_card):
    with pytest.raises(UserError, match="^--device cuda: CUDA error: no kernel image .*whl/cu126") as error:
        choose_device("cuda")
    assert "\n" not in str(error.value)


def test_auto_says_why_it_takes_the_cpu(broken_card, capsys):
    assert choose_device("auto") == torch.device("cpu")
    said, = capsys.readouterr().err.splitlines()
    assert "no kernel image" in said and "whl/cu126" in said


def test_auto_is_silent_where_there_is_no_card(broken_card, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert choose_device("auto") == torch.device("cpu") and capsys.readouterr().err == ""


def test_the_chosen_card_becomes_the_current_one_without_cudnn_attention(monkeypatch):
    current, cudnn = [], []
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") and choose_device("cuda", 3) == torch.device("cuda:3")
    assert current == [torch.device("cuda:1"), torch.device("cuda:3")] and cudnn == [False, False]


def test_cards_without_bf16_units_train_in_fp16_with_scaling(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert training_dtype(CUDA) == torch.float16
    run = SimpleNamespace(device=CUDA, args=SimpleNamespace(dtype="bfloat16", parallel="ddp"))
    assert Run._choose_dtype(run) == torch.float16
    run.args.parallel = "fsdp"  # which does not scale the loss
    assert Run._choose_dtype(run) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert Run._choose_dtype(run) == torch.bfloat16


def test_what_a_launcher_left_behind_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="RANK and WORLD_SIZE are set.*MASTER_ADDR.*torchrun"), \
            distributed.init_distributed("cpu"):
        pass


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_when_a_scaled_gradient_overflows_no_optimizer_steps(value):
    model = small_model(vocab_size=64, hidden_size=32)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16, world=World())
    strategy = DDPStrategy(run, model, partial(make_optimizers, name="muon", lr=1e-2, weight_decay=0.1,
                                               muon_dtype=torch.float32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    strategy.backward(sum((p**2).sum() for p in model.parameters()))
    model.model.layers[0].self_attn.q_proj.weight.grad[0, 0] = value  # one that Muon updates; AdamW has the embedding
    strategy.clip_grad_norm(1.0)
    strategy.optimizer_step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == (set(before) if math.isfinite(value) else set())


def test_small_gradients_are_orthogonalised_in_fp16_too():
    gradient = 1e-7 * torch.randn(2, 16, 32)
    assert_close(orthogonalise(gradient, torch.float16).float(), orthogonalise(gradient, torch.float32), atol=2e-2,
                 rtol=0)


def test_a_rank_takes_the_device_of_its_own_number(monkeypatch):
    chosen = []
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "choose_device", lambda *args: chosen.append(args) or CUDA)
    monkeypatch.setattr(distributed.dist, "init_process_group", mock.Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError), distributed.init_distributed("cuda:0"):
        pass
    assert chosen == [("cuda", 1)]


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_checkpointed_blocks_are_compiled_too(lab, monkeypatch, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without a C++ compiler
    lab("compiled").train(use_compile=1, activation_checkpointing=checkpointing, max_steps=2)
    assert counters["stats"]["unique_graphs"] > 1  # the first is the trial of the compiler
    lab("eager").train(max_steps=2)
    assert_close(lab("compiled").losses(), lab("eager").losses(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device, expected", [("cpu", 0), ("cuda", 1)])
def test_compiling_is_the_default_on_cuda_only(lab, monkeypatch, device, expected):
    class Chosen(Exception):
        pass

    def load_model(run):
        raise Chosen(run.args.use_compile)

    monkeypatch.setattr("trainer.run.init_distributed", lambda _: nullcontext((World(), torch.device(device))))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(Run, "load_model", load_model)
    with pytest.raises(Chosen, match=f"^{expected}$"):
        lab().train()


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_rollout_on_a_gpu_casts_each_weight_once(use_moe):
    model = small_model(use_moe=use_moe)
    with mock.patch.object(type(model), "device", CUDA):
        packed = dict(prepack(model, torch.bfloat16))
        assert not prepack(model, torch.float32)
    cast = {}  # every matrix but the embedding, once: joined ones are stacked, in the order of their names
    for path, weight in packed.items():
        if isinstance(weight, dict):
            cast |= {f"{path}.{name}": stack for name, stack in weight.items()}
            continue
        parent, dot, names = path.rpartition(".")
        names = [f"{parent}{dot}{name}.weight" for name in names.split("+")]
        cast |= zip(names, weight.split([len(model.get_parameter(name)) for name in names]), strict=True)
    matrices = {name: p for name, p in model.state_dict().items() if p.dim() > 1 and "embed" not in name}
    assert cast.keys() == matrices.keys()
    for name, matrix in matrices.items():
        assert_close(cast[name], matrix.to(torch.bfloat16), rtol=0, atol=0)


def test_graphs_do_not_outlive_the_copies_that_they_read(monkeypatch):
    monkeypatch.setattr(model_runner, "prepack", lambda *_: {"lm_head": torch.zeros(1)})
    runner = Engine(small_model(), graphs=True).runner
    runner.graphs._graphs[1, 256] = None
    runner.prepack()
    assert not runner.graphs._graphs


class OnMPS(torch.Tensor):
    device = torch.device("mps")


def test_the_memory_of_a_program_is_its_own():
    parent = torch.ones(2**28)  # 1 GB, more than a program that only imports torch has, built for CUDA too
    code = "import torch\nfrom model.device import peak_memory\nprint(peak_memory(torch.device('cpu')))"
    peak = float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True))
    assert peak < parent.nbytes / 1e9


def test_advantages_are_whitened_on_mps_without_float64(monkeypatch):
    zeros, dtypes = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: dtypes.append(dtype) or zeros(size, dtype=dtype))
    values = torch.randn(9)
    for advantage in (values.as_subclass(OnMPS), values):
        whiten([batch := {"advantage": advantage}], World())
        assert_close(torch.Tensor(batch["advantage"]), (values - values.mean()) / values.std(correction=0))
    assert dtypes == [torch.float32, torch.float64]


def test_a_mask_of_few_queries_is_given_whole_to_mps():
    mask = torch.ones(2, 1, 2, 7, dtype=torch.bool)
    q = torch.zeros(2, 4, 2, 8)
    assert _mask_for_mps(q, mask) is mask
    assert _mask_for_mps(q.as_subclass(OnMPS), mask).stride() == (56, 14, 7, 1)
    assert _mask_for_mps(torch.zeros(2, 4, 9, 8).as_subclass(OnMPS), mask) is mask
