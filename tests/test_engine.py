"""The inference engine against plain decoding and transformers' logits processors, and the terminal chat on top."""

import builtins
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.generation import logits_process as referee

import eval_llm
from model import model_minimind, moe
from model.chat import BOS, EOS, SPECIAL_TOKENS, ChatTokenizer
from model.cli import run_main
from model.device import inference_dtype
from model.inference import kv_cache, model_runner
from model.inference.cuda_graphs import DecodeGraphs, can_capture, graph_batch_size
from model.inference.engine import Engine, SamplingParams, Sequence, generate
from model.inference.prepacked import prepack, use_prepacked
from model.inference.sampling import sample
from model.linear import linear
from model.model_lora import LoRAConfig, apply_lora, lora_state
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_weight, save_weight
from scripts.lib.terminal import HELP
from scripts.server.engine_thread import EngineThread

KINDS = {"dense": {}, "moe": {"use_moe": True}, "moe-top2": {"use_moe": True, "num_experts_per_tok": 2},
         "yarn": {"inference_rope_scaling": True}}
every_kind = pytest.mark.parametrize("kind", KINDS)
greedy = partial(SamplingParams, temperature=0, stop_ids=())
free = partial(SamplingParams, temperature=1.0, top_p=1.0, stop_ids=())
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


def answers(*request, **options) -> list[list[int]]:
    return [sequence.completion_ids for sequence in generate(*request, **options)]


@pytest.fixture
def short_slots(monkeypatch):
    """The cache starts with slots of 8 tokens, so that it grows, shrinks and runs out."""
    monkeypatch.setattr(kv_cache, "MIN_SLOT_LEN", 8)


# -- decoding ----------------------------------------------------------------------------------------------------------


@every_kind
def test_greedy_answers_of_mixed_batches_are_those_of_one_by_one_decoding_without_a_cache(kind, short_slots):
    model, dice = lively_model(kind), random.Random(2)
    prompts = some_prompts(*(dice.choice([1, 2, 5, 11, 23]) for _ in range(100)))
    lengths = [dice.choice([1, 3, 8]) for _ in prompts]
    expected = [plainly(model, prompt, tokens) for prompt, tokens in zip(prompts, lengths, strict=True)]
    assert len({token for answer in expected for token in answer}) > 20
    engine = Engine(model, max_batch=7, max_tokens=120, prefill_chunk=9)
    sequences = []
    for prompt, tokens in zip(prompts, lengths, strict=True):
        sequences.append(engine.add(prompt, greedy(tokens)))
        if dice.random() < 0.5:
            engine.step()
    while engine.busy:
        engine.step()
    assert [sequence.completion_ids for sequence in sequences] == expected
    assert {sequence.finish_reason for sequence in sequences} == {"length"}


def test_a_stop_token_ends_its_row_and_no_other():
    model, prompts = lively_model(), some_prompts(5, 9, 2)
    whole = [plainly(model, prompt, 12) for prompt in prompts]
    stop = whole[1][3]
    ended = generate(model, prompts, greedy(12, stop_ids=(stop,)))
    for sequence, answer in zip(ended, whole, strict=True):
        end = answer.index(stop) if stop in answer else 12
        assert sequence.completion_ids == answer[:end + 1]
        assert [token for token, *_ in sequence.next_delta().tokens] == answer[:end]
        assert sequence.finish_reason == ("stop" if stop in answer else "length")
    assert len(ended[1].completion_ids) <= 4 and max(len(sequence.completion_ids) for sequence in ended) == 12


def test_a_long_prompt_is_read_in_chunks_and_stalls_nobody():
    model, (long, short) = lively_model(), some_prompts(60, 4)
    engine = Engine(model, prefill_chunk=8)
    running = engine.add(short, greedy(40))
    engine.step()
    sequence, steps = engine.add(long, greedy(4)), 0
    while not sequence.completion_ids:
        before, steps = len(running.completion_ids), steps + 1
        engine.step()
        assert len(running.completion_ids) == before + 1
    assert steps == 8
    while engine.busy:
        engine.step()
    assert sequence.completion_ids == plainly(model, long, 4) and running.completion_ids == plainly(model, short, 40)


def test_prompts_share_a_chunk_as_far_as_they_fit_it_when_padded():
    engine = Engine(lively_model(), prefill_chunk=16)
    for prompt in some_prompts(5, 6, 7, 40):
        engine.add(prompt)
    batch, = engine.scheduler.schedule()
    assert list(map(len, batch.chunks)) == [5, 6] and batch.sampled_rows == [0, 1] and not batch.is_decode


def test_the_padding_of_a_short_chunk_stays_in_its_slot(monkeypatch):
    monkeypatch.setattr(kv_cache, "MIN_SLOT_LEN", 16)
    model, (prefix, end, other) = lively_model(), some_prompts(12, 2, 9)
    engine = Engine(model, max_batch=2)
    engine.generate([prefix], [greedy(1)])
    prompts = [prefix + end, other]  # 2 and 9 tokens to compute, and 16 in a slot
    sequences = engine.generate(prompts, [greedy(2)] * 2)
    assert sequences[0].num_cached_tokens == 12
    assert [s.completion_ids for s in sequences] == [plainly(model, prompt, 2) for prompt in prompts]


@pytest.mark.parametrize("compile", [False, True])
def test_a_model_in_transformers_format_answers_as_transformers_does(compile, monkeypatch):
    compile_by("eager", monkeypatch)
    config = Qwen3Config(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    prompts = some_prompts(7, 1, 19)
    ask = partial(model.generate, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = [ask(torch.tensor([prompt]))[0, len(prompt):].tolist() for prompt in prompts]
    assert answers(model, prompts, greedy(9), prefill_chunk=6, compile=compile) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_those_of_linear(dtype):
    weight = torch.randn(40, 24).to(dtype)
    for shape in ((1, 24), (5, 24), (2, 3, 24), (1, 1, 24), (33, 24), (130, 24)):
        x = torch.randn(shape).to(dtype)
        with torch.inference_mode():
            assert_close(linear(x, weight), F.linear(x, weight))
            columns = x.mT.contiguous().mT  # as another product leaves them
            assert_close(linear(columns, weight), F.linear(x, weight))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_multiply_as_the_weights_do_and_only_while_in_use(kind, dtype):
    if not torch.backends.mkldnn.is_available() or \
            dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no oneDNN here, or none for bf16")
    model = lively_model(kind).to(dtype)
    prepacked, used = prepack(model, dtype), []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]

    def noted(x, weight, prepacked=None):
        used.append(prepacked is not None)
        result = linear(x, weight, prepacked)
        first = next((i for i, layer in enumerate(layers) if layer.weight is weight), None)
        if first is not None:  # no expert; with this weight, those that are joined to it
            num_rows = [len(layer.weight) for layer in layers[first:]]
            num_joined = next(n for n in (1, 2, 3) if sum(num_rows[:n]) == result.shape[-1])
            weight = torch.cat([layer.weight for layer in layers[first:first + num_joined]])
        assert_close(result, F.linear(x, weight), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)
        return result

    with torch.inference_mode(), mock.patch("model.linear.linear", noted), mock.patch("model.moe.linear", noted):
        for length in (1, 3, 17, 130):
            ids = torch.tensor(some_prompts(length))
            plain = model(ids).logits
            assert not any(used)
            used.clear()
            with use_prepacked(prepacked):
                logits = model(ids).logits
            if dtype == torch.float32:  # in half precision another rounding may choose another expert
                assert_close(logits, plain, atol=1e-4, rtol=1e-3)
            assert all(used)
            used.clear()
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(model(ids).logits, plain)
        assert not any(used)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")
def test_an_engine_multiplies_by_packed_weights():
    with mock.patch("model.linear.linear", wraps=linear) as noted:
        answers(lively_model(), some_prompts(9, 4), greedy(3))
    assert noted.call_count > 20 and all(call.args[2] is not None for call in noted.call_args_list)


def test_weights_that_are_elsewhere_are_not_packed():
    model = lively_model()
    assert not prepack(model.half(), torch.float16)
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)  # as FSDP does
    assert not prepack(model.float(), torch.float32) and not prepack(lively_model().to("meta"), torch.float32)


def compile_by(backend, monkeypatch) -> None:
    """Let engines compile by another backend than Inductor."""
    def compile(decoder, options=None, compile=torch.compile, **kwargs):
        ours = {name: options[name] for name in options or {} if name == "guard_filter_fn"}  # the others are Inductor's
        return compile(decoder, backend=backend, options=ours, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(model_runner, "compile_error", lambda *_: None)


@pytest.mark.parametrize("compile", [False, True])
def test_layers_with_an_adapter_are_not_joined(compile, monkeypatch):
    compile_by("eager", monkeypatch)
    model, prompts = lively_model(), some_prompts(15, 3)
    engine = Engine(model, compile=compile)  # which joins them
    engine.generate(prompts, [greedy(2)] * 2)
    apply_lora(model, LoRAConfig(rank=2, targets=("k_proj", "up_proj")))
    for parameter in lora_state(model).values():
        parameter.data.normal_(std=0.3)
    engine.reset_prefix_cache()
    sequences = engine.generate(prompts, [greedy(4)] * 2)
    assert [sequence.completion_ids for sequence in sequences] == [plainly(model, prompt, 4) for prompt in prompts]


def test_a_compiled_step_answers_alike_and_needs_few_graphs(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    compile_by(counter, monkeypatch)
    monkeypatch.setattr(kv_cache, "MIN_SLOT_LEN", 16)  # the cache grows on the way
    torch._dynamo.reset()
    model, prompts = lively_model(), some_prompts(15, 13, 19, 14, 12, 17, 16)
    expected = [plainly(model, prompt, 6 + number) for number, prompt in enumerate(prompts)]
    engine = Engine(model, max_batch=6, compile=True)
    sequences = []
    while engine.busy or len(sequences) < len(prompts):  # one more joins at every step, and they leave one by one
        if len(sequences) < len(prompts):
            sequences.append(engine.add(prompts[len(sequences)], greedy(6 + len(sequences))))
        engine.step()
    assert [sequence.completion_ids for sequence in sequences] == expected
    assert counter.frame_count == 2  # for one row, and for more
    if engine.runner.prepacked:
        for graph in counter.graphs:  # of a block: one product for q, k, v, one for o, gate and up, down
            targets = [node.target for node in graph.graph.nodes]
            assert targets.count(torch.ops.minimind.prepacked_linear) == 4 * len(model.model.layers)


def test_a_warm_engine_has_compiled_all_it_needs(monkeypatch, capsys):
    counter = CompileCounterWithBackend("eager")
    compile_by(counter, monkeypatch)
    torch._dynamo.reset()
    engine = Engine(lively_model(), max_batch=16, compile=True)
    engine.warm_up()
    assert counter.frame_count == 2  # one row, and several
    assert "compiling" in capsys.readouterr().err
    for num_rows in (1, 2, 4, 9, 16):  # 4 as there are heads, 16 as there are slots
        engine.generate(some_prompts(*range(5, 5 + num_rows)), [greedy(4)] * num_rows)
    engine.generate(some_prompts(300), [greedy(4)])  # in larger slots
    assert counter.frame_count == 2
    eager = Engine(lively_model())
    eager.warm_up()
    assert capsys.readouterr().err == "" and not eager.slots.slots


def test_blocks_compiled_for_training_are_not_compiled_for_sampling():
    model, prompts = lively_model(), some_prompts(15, 3)
    expected, counter = [plainly(model, prompt, 4) for prompt in prompts], CompileCounter()
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend=counter)
    assert answers(model, prompts, greedy(4)) == expected and counter.frame_count == 0
    model(torch.tensor(prompts[:1]))
    assert counter.frame_count > 0


def test_a_compiled_step_reads_the_weights_as_they_are(monkeypatch):
    compile_by("eager", monkeypatch)
    model, prompts = lively_model(), some_prompts(15, 3)
    for _ in range(2):
        assert answers(model, prompts, greedy(4), compile=True) == [plainly(model, prompt, 4) for prompt in prompts]
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_a_compiled_step_is_of_its_own_model_and_its_own_batch(monkeypatch):
    # of its modules nothing is checked; here steps of another model come between, a row joins, threads change
    compile_by("eager", monkeypatch)
    monkeypatch.setattr(kv_cache, "MIN_SLOT_LEN", 16)
    torch._dynamo.reset()
    models, prompts = [lively_model(), lively_model("yarn")], some_prompts(15, 1, 13)
    engines = [Engine(model, max_batch=4, compile=True) for model in models]
    sequences = [[engine.add(prompts[0], greedy(30))] for engine in engines]
    all_threads = torch.get_num_threads()
    try:
        for number in range(40):
            for engine, added in zip(engines, sequences, strict=True):
                if number in (6, 12):
                    added.append(engine.add(prompts[number // 6], greedy(8)))
                engine.step()
            torch.set_num_threads(1 if 15 < number < 20 else all_threads)
    finally:
        torch.set_num_threads(all_threads)
    for model, added in zip(models, sequences, strict=True):
        expected = [plainly(model, prompt, len(s.completion_ids)) for prompt, s in zip(prompts, added, strict=True)]
        assert [sequence.completion_ids for sequence in added] == expected and len(added[0].completion_ids) == 30


@pytest.mark.parametrize("kind, reason", [("dense", "RuntimeError: is a C++ compiler installed?"),
                                          ("moe", "on a CPU the experts are computed one by one")])
def test_where_nothing_can_be_compiled_an_engine_goes_on_eagerly(kind, reason, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no C++ compiler")))
    model, prompts = lively_model(kind), some_prompts(15, 3)
    assert answers(model, prompts, greedy(4), compile=True) == [plainly(model, prompt, 4) for prompt in prompts]
    assert capsys.readouterr().err == f"compile: not possible here, continuing without it ({reason})\n"


class Recorder(TorchDispatchMode):
    """A CUDA graph on any device: notes what is computed on which tensors, to compute that again and nothing else."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default), \
            f"{function} is between host and device: no graph holds that"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            for old, new in zip(*map(tree_leaves, (out, function(*args, **kwargs))), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
def captured(request, monkeypatch) -> tuple[str, list, list]:
    """The device, and a note of every capture and of every replay of decoding graphs."""
    captures, replays, capture = [], [], DecodeGraphs._capture

    def noted(self, work, device):
        if request.param == "cuda":
            result, replay = capture(self, work, device)
        else:
            recorder = Recorder()
            with recorder:
                result = work()
            replay = recorder.replay
        captures.append(result.shape)
        return result, lambda: replays.append(replay())

    monkeypatch.setattr(DecodeGraphs, "_capture", noted)
    monkeypatch.setattr(kv_cache, "MIN_SLOT_LEN", 16)  # the cache grows on the way
    if request.param == "recorded":  # as on a GPU: experts are not counted on the host, no weight is packed
        monkeypatch.setattr(moe, "use_dense_experts", lambda *_: True)
        monkeypatch.setattr(model_runner, "prepack", lambda *_: {})
    return "cpu" if request.param == "recorded" else "cuda", captures, replays


@every_kind
def test_steps_replayed_from_graphs_answer_alike_while_others_come_and_go(kind, captured):
    device, captures, replays = captured
    model = lively_model(kind).to(device, torch.bfloat16 if "moe" in kind and device == "cuda" else torch.float32)
    prompts, lengths = some_prompts(15, 13, 19, 14, 12, 17, 16, 2, 3), [6, 14, 8, 9, 25, 11, 12, 13, 30]
    expected = [answers(model, [prompt], greedy(length), graphs=False)[0]
                for prompt, length in zip(prompts, lengths, strict=True)]
    for chunk in (512, 1):  # then prompts too are read token by token
        engine, sequences = Engine(model, max_batch=6, prefill_chunk=chunk, graphs=True), []
        while engine.busy or len(sequences) < len(prompts):
            if len(sequences) < len(prompts):
                sequences.append(engine.add(prompts[len(sequences)], greedy(lengths[len(sequences)])))
            engine.step()
        assert [sequence.completion_ids for sequence in sequences] == expected
    assert 4 <= len(captures) < len(replays)
    assert {shape[0] for shape in captures} == {1, 6}  # few batch sizes, and no more than slots


def test_few_batch_sizes_are_captured():
    sizes = [graph_batch_size(num_rows) for num_rows in range(1, 257)]
    assert sorted(set(sizes)) == [1, 8, *range(32, 257, 32)]
    assert all(num_rows <= size for num_rows, size in enumerate(sizes, 1))


def test_a_graph_reads_the_weights_as_they_are(captured):
    device, captures, _ = captured
    model, prompts = lively_model().to(device), some_prompts(15)
    engine = Engine(model, graphs=True)
    for _ in range(2):
        sequence = engine.add(prompts[0], greedy(8))
        while engine.busy:
            engine.step()
        assert sequence.completion_ids == answers(model, prompts, greedy(8), graphs=False)[0] and len(captures) == 1
        engine.reset_prefix_cache()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_graphs_are_dropped_when_the_cache_has_moved(captured):
    device, captures, _ = captured
    model = lively_model().to(device)
    engine = Engine(model, graphs=True)
    for prompt in some_prompts(5, 20, 6):  # the second one needs longer slots
        sequence = engine.add(prompt, greedy(8))
        while engine.busy:
            engine.step()
        assert sequence.completion_ids == answers(model, [prompt], greedy(8), graphs=False)[0]
    assert len(captures) == 3


def test_graphs_are_for_what_is_all_on_a_gpu():
    model = lively_model("moe").to("meta")
    with mock.patch.object(type(model), "device", torch.device("cuda")), \
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)) as capability:
        assert can_capture(model, torch.bfloat16, 999) and not can_capture(model, torch.float16, 999)
        for capability.return_value in ((8, 6), (12, 0)):  # there grouped_mm is a loop that asks the device
            assert not can_capture(model, torch.bfloat16, 999)
            assert can_capture(model, torch.bfloat16, 256)  # all experts take all tokens
            assert can_capture(lively_model().to("meta"), torch.float16, 999)
        model.model.register_forward_pre_hook(lambda *_: None)  # as FSDP does
        assert not can_capture(model, torch.bfloat16, 1)
    assert not can_capture(lively_model(), torch.bfloat16, 1) and Engine(lively_model()).runner.graphs is None
    with torch.device("meta"), mock.patch.object(Qwen3ForCausalLM, "device", torch.device("cuda")):
        theirs = Qwen3ForCausalLM(Qwen3Config(vocab_size=97, hidden_size=64, num_hidden_layers=1))
        assert not can_capture(theirs, torch.bfloat16, 1)


def test_a_device_that_refuses_a_capture_is_told_once_and_decoded_on_without(captured, monkeypatch):
    device, *_ = captured
    model, prompts = lively_model().to(device), some_prompts(3, 4)

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(DecodeGraphs, "_capture", refuse)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted when stream is cap") as told:
        assert answers(model, prompts, greedy(30), graphs=True) == answers(model, prompts, greedy(30), graphs=False)
    assert len(told) == 1


def test_experts_are_used_in_the_precision_that_one_kernel_takes():
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 6), torch.float16)):
        with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
            assert inference_dtype("cuda", use_moe=True) == dtype and inference_dtype("cuda") == torch.float16


def test_after_the_weights_changed_nothing_cached_is_used():
    model, (prompt,) = lively_model(), some_prompts(20)
    engine = Engine(model)

    def answer() -> Sequence:
        sequence = engine.add(prompt, greedy(5))
        while engine.busy:
            engine.step()
        return sequence

    answer()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    engine.reset_prefix_cache()
    again = answer()
    assert again.completion_ids == plainly(model, prompt, 5) and again.num_cached_tokens == 0
    engine.add(prompt, greedy(5))
    with pytest.raises(RuntimeError, match="while requests are running"):
        engine.reset_prefix_cache()


def test_no_prompts_have_no_answers():
    assert generate(lively_model(), [], greedy(4)) == []


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_prompt_without_room_for_an_answer_is_a_mistake_of_its_request_alone():
    model, fits, too_long = lively_model(max_position_embeddings=16), *some_prompts(15, 16)
    engine = Engine(model)
    sequence = engine.add(fits, greedy(40))
    with pytest.raises(ValueError, match="16 tokens .* 16 positions"):
        engine.add(too_long)
    for wrong, what in (([], "empty"), ([5, 97], "97 tokens"), ([-1], "97 tokens")):
        with pytest.raises(ValueError, match=what):
            engine.add(wrong)
    while engine.busy:
        engine.step()
    assert sequence.completion_ids == plainly(model, fits, 2)  # what the last two positions predict
    assert sequence.finish_reason == "length" and engine.num_running == 0
    with pytest.raises(ValueError, match="8 tokens .* cache's 8 positions"):
        Engine(model, max_tokens=8).add(fits[:8])


def test_sequences_that_outgrow_the_cache_take_turns(short_slots):
    model, prompts = lively_model(), some_prompts(6, 7, 5)
    engine = Engine(model, max_batch=3, max_tokens=48)
    sequences = [engine.add(prompt, greedy(30)) for prompt in prompts]
    seen = set()
    while engine.busy:
        engine.step()
        seen.add(engine.num_running)
        assert engine.slots.cache.num_slots * engine.slots.cache.slot_len <= 48
    assert seen >= {3, 1} and engine.slots.cache.num_resizes < 8  # slots double, which is rare
    assert [sequence.completion_ids for sequence in sequences] == [plainly(model, prompt, 30) for prompt in prompts]


# -- events ------------------------------------------------------------------------------------------------------------


def test_a_thousand_events_leak_no_slot_and_survivors_answer_as_if_alone(short_slots):
    model, dice = lively_model(), random.Random(4)
    begin = some_prompts(12)[0]
    requests = [(begin[:dice.randrange(1, 12)] + prompt, free(dice.randrange(1, 12), temperature=t, seed=n))
                for n, (prompt, t) in enumerate(zip(some_prompts(*range(1, 17)), [0, 0.7, 1, 1.3] * 4, strict=True))]
    alone = [answers(model, [prompt], [sampling])[0] for prompt, sampling in requests]
    engine, added, cancelled = Engine(model, max_batch=4, max_tokens=120, prefill_chunk=7), [], 0
    for _ in range(1000):
        event = dice.random()
        if event < 0.25:
            number = dice.randrange(len(requests))
            added.append((number, engine.add(*requests[number])))
        elif event < 0.35 and added:
            sequence = dice.choice(added[-8:])[1]
            cancelled += sequence.finish_reason is None
            engine.cancel(sequence)
            assert sequence.finish_reason is not None
        else:
            engine.step()
        unfinished = sum(sequence.finish_reason is None for _, sequence in added)
        assert engine.num_waiting + engine.num_running == unfinished and engine.num_running <= 4
    while engine.busy:
        engine.step()
    assert engine.num_running == 0 and engine.num_waiting == 0 and cancelled > 20
    survivors = [(number, sequence) for number, sequence in added if sequence.finish_reason != "cancelled"]
    assert len(survivors) > 100 and any(sequence.num_cached_tokens for _, sequence in survivors)
    for number, sequence in survivors:
        assert sequence.completion_ids == alone[number]
    for number, sequence in added:
        assert sequence.completion_ids == alone[number][:len(sequence.completion_ids)]


def test_a_step_that_fails_cancels_what_ran_and_nobody_after_it():
    engine, params = Engine(lively_model(), max_batch=2), SamplingParams(4, stop_ids=())
    running, waiting = [engine.add(prompt, params) for prompt in some_prompts(5, 6)], engine.add([7, 8], params)
    engine.step()
    with mock.patch("model.inference.engine.sample", side_effect=RuntimeError("no memory")), \
            pytest.raises(RuntimeError, match="no memory"):
        engine.step()
    assert [sequence.finish_reason for sequence in running] == ["cancelled"] * 2 and waiting.finish_reason is None
    *_, last = engine.stream(waiting)
    assert last.finish_reason == "length" and not engine.busy


def test_a_step_that_fails_after_a_sequence_has_finished_frees_its_slot_too(monkeypatch):
    engine = Engine(lively_model(), max_batch=2)
    first, second = [engine.add(prompt, SamplingParams(1, stop_ids=())) for prompt in some_prompts(5, 5)]
    monkeypatch.setattr(second, "append_token", mock.Mock(side_effect=RuntimeError("too complex")))
    with pytest.raises(RuntimeError, match="too complex"):
        engine.step()
    assert first.finish_reason == "length" and second.finish_reason == "cancelled" and not engine.busy


def test_streams_of_several_threads_give_each_all_of_its_tokens_and_a_closed_one_is_cancelled():
    model, prompts = lively_model(), some_prompts(9, 3, 14, 6)
    engine = Engine(model, TOKENIZER)
    requests = [(prompt, greedy(20 + 5 * number, top_logprobs=1)) for number, prompt in enumerate(prompts)]

    def run(request: tuple) -> tuple:
        sequence = engine.add(*request)
        return sequence, list(engine.stream(sequence))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, requests))
    for (sequence, deltas), (prompt, params) in zip(results, requests, strict=True):
        ids, logprobs, top_logprobs = zip(*(token for delta in deltas for token in delta.tokens), strict=True)
        assert list(ids) == sequence.completion_ids == plainly(model, prompt, params.max_new_tokens)
        assert (list(logprobs), list(top_logprobs)) == (sequence.logprobs, sequence.top_logprobs)
        assert [piece for delta in deltas for piece in delta.pieces] == sequence.output_pieces
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
        assert sum(delta.num_tokens for delta in deltas) == params.max_new_tokens
    sequence = engine.add(prompts[0], greedy(1000))
    deltas = engine.stream(sequence)
    next(deltas)
    deltas.close()
    assert sequence.finish_reason == "cancelled" and not engine.busy


def test_a_prompt_shared_by_many_samples_is_computed_once():
    model, prompt = lively_model(), some_prompts(30)[0]
    sampling = [free(12, seed=seed) for seed in range(6)]
    alone = [answers(model, [prompt], [each])[0] for each in sampling]
    read, forward = [], model.model.forward

    def counting(**request):
        read.append(request["input_ids"].numel())
        return forward(**request)

    with mock.patch.object(model.model, "forward", counting):
        sequences = generate(model, [prompt] * 6, sampling)
    assert [sequence.completion_ids for sequence in sequences] == alone and len(set(map(tuple, alone))) == 6
    assert [sequence.num_cached_tokens for sequence in sequences] == [0] + [29] * 5
    assert sum(read) == 30 + 11 + 5 * 12


@every_kind
def test_attention_that_reads_a_common_beginning_once_is_plain_attention(kind, monkeypatch):
    """Groups of one system prompt and several questions, of many lengths; for a while one that begins otherwise."""
    monkeypatch.setattr(model_runner, "MIN_PREFIX_SHARE", 1)
    model, (system, stranger, *questions) = lively_model(kind), some_prompts(40, 13, 3, 9, 1)
    prompts = [system + question + own for question in questions for own in ([], *some_prompts(1, 5), [])]
    engine, shared, logits = Engine(model), [], {}
    draw_some, attention = engine._sample, model_minimind.attention

    def attended(*arguments):
        shared.append(arguments[-1].shared_prefix_len)
        return attention(*arguments)

    def drawn(rows: torch.Tensor, sequences: list[Sequence]):
        logits.update({(*s.prompt_ids, *s.completion_ids): row for s, row in zip(sequences, rows.clone(), strict=True)})
        return draw_some(rows, sequences)

    monkeypatch.setattr(model_minimind, "attention", attended)
    monkeypatch.setattr(engine, "_sample", drawn)
    lengths = [3 + number if number not in (8, 11) else 24 for number in range(len(prompts))]
    sequences = [engine.add(*request) for request in zip(prompts, map(greedy, lengths), strict=True)]
    while engine.busy:
        engine.step()
        if len(sequences[0].completion_ids) == 2:
            engine.add(stranger, greedy(3))
    assert {0, 40, 41} <= set(shared) and max(shared) > 60  # all groups, one, at last the same prompt twice
    for sequence, tokens in zip(sequences, lengths, strict=True):
        assert sequence.completion_ids == plainly(model, sequence.prompt_ids, tokens)
    for text, row in logits.items():
        assert_close(row, model(torch.tensor([text])).logits[0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_batch", [1, 4])
def test_earlier_turns_are_not_computed_again(max_batch):
    model, (first, second, other) = lively_model(), some_prompts(20, 9, 25)
    engine = Engine(model, max_batch=max_batch)

    def ask(prompt: list[int]) -> Sequence:
        sequence = engine.add(prompt, greedy(10))
        while engine.busy:
            engine.step()
        assert sequence.completion_ids == plainly(model, prompt, 10)
        return sequence

    turn = ask(first)
    again = ask(first + turn.completion_ids + second)
    assert (turn.num_cached_tokens, again.num_cached_tokens) == (0, 29)  # the first answer's last token was never read
    assert ask(other).num_cached_tokens == 0
    assert ask(first + turn.completion_ids + second).num_cached_tokens == (38 if max_batch == 4 else 0)
    assert engine.num_cached_tokens == 29 + (38 if max_batch == 4 else 0)


# -- sampling ----------------------------------------------------------------------------------------------------------

REQUESTS = [
    {}, {"temperature": 0.6}, {"temperature": 1.7, "top_p": 0.7}, {"top_p": 0.0}, {"top_k": 5}, {"top_k": 1},
    {"top_k": 9, "top_p": 0.5}, {"min_p": 0.2}, {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"repetition_penalty": 1.8}, {"repetition_penalty": 0.7, "top_p": 0.8}, {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8, "temperature": 0.9}, {"presence_penalty": -1.0, "frequency_penalty": 0.5},
]


def processed(logits: torch.Tensor, sampling: SamplingParams, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """log p [V] of the next token by transformers' processors; presence and frequency as OpenAI's manual gives them."""
    scores, text = logits[None].float(), torch.tensor([prompt + ids])
    if sampling.logit_bias:
        bias = [[[token], value] for token, value in sampling.logit_bias]
        scores = referee.SequenceBiasLogitsProcessor(bias)(text, scores)
    if sampling.repetition_penalty != 1:
        scores = referee.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(text, scores)
    for token, times in Counter(ids).items():
        scores[0, token] -= times * sampling.frequency_penalty + sampling.presence_penalty
    if sampling.temperature not in (0, 1):
        scores = referee.TemperatureLogitsWarper(sampling.temperature)(text, scores)
    if sampling.temperature:
        if sampling.top_k:
            scores = referee.TopKLogitsWarper(sampling.top_k)(text, scores)
        if sampling.top_p < 1:
            scores = referee.TopPLogitsWarper(sampling.top_p)(text, scores)
        if sampling.min_p:
            scores = referee.MinPLogitsWarper(sampling.min_p)(text, scores)
    return scores[0].log_softmax(-1)


@pytest.mark.parametrize("wanted", [request for request in REQUESTS if not free(1, **request).has_penalties], ids=str)
def test_draws_follow_the_distribution_of_transformers(wanted):
    """Evenly spaced numbers instead of random ones: then each share is the probability, to within one draw."""
    logits, sampling, draws = 2 * torch.randn(60), free(1, **wanted), 4000
    expected = processed(logits, sampling, [], [])
    numbers = [(i + 0.5) / draws for i in range(draws)]
    # rows of other kinds between them must not matter
    others = [free(1), greedy(1), free(1, top_k=3, temperature=0.5)]
    tokens, logprobs, _ = sample(logits.expand(draws + 3, -1), [sampling] * draws + others, numbers + [0.5] * 3)
    share = torch.tensor(tokens[:draws]).bincount(minlength=60) / draws
    assert_close(share, expected.exp(), rtol=0, atol=1.01 / draws)
    assert (share[expected.exp() == 0] == 0).all()
    assert_close(torch.tensor(logprobs[:draws]), expected[tokens[:draws]], rtol=0, atol=1e-5)
    assert tokens[draws + 1] == int(logits.argmax())


def test_the_extremes_of_the_unit_interval_draw_tokens_that_can_be_drawn():
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]]).expand(2, -1)
    assert sample(logits, [free(1)] * 2, [0.0, 1 - 2**-53])[0] == [1, 2]


def test_wild_numbers_harm_nobody():
    model, prompt = lively_model(), some_prompts(9)[0]
    expected = plainly(model, prompt, 5)
    wild = [free(5, **{name: value}) for name in ("temperature", "repetition_penalty") for value in (1e-38, 1e38)]
    wild += [free(5, presence_penalty=1e38, frequency_penalty=-1e38), free(5, top_k=2**62, top_p=1e-300)]
    sequences = generate(model, [prompt] * 7, [*wild, greedy(5)])
    assert sequences[-1].completion_ids == expected and all(len(sequence.completion_ids) == 5 for sequence in sequences)
    assert sample(torch.full((2, 9), torch.nan), [free(1), greedy(1)], [0.5, 0.5])[0]


@pytest.mark.parametrize("wanted", [
    *REQUESTS, {"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.5},
    {"logit_bias": ((40, 3.0), (41, -100.0)), "repetition_penalty": 1.5, "top_k": 9}], ids=str)
def test_the_log_probability_of_each_token_is_that_of_a_full_forward_under_the_same_processors(wanted):
    model, prompts = lively_model(), some_prompts(6, 15)
    sampling = free(10, top_logprobs=4, **wanted)
    for sequence in generate(model, prompts + [[40, 41]] * 2, [sampling] * 2 + [greedy(10), free(8)])[:2]:
        assert len(sequence.completion_ids) == len(sequence.logprobs) == len(sequence.top_logprobs) == 10
        for i, token in enumerate(sequence.completion_ids):
            logits = model(torch.tensor([sequence.prompt_ids + sequence.completion_ids[:i]])).logits[0, -1]
            expected = processed(logits, sampling, sequence.prompt_ids, sequence.completion_ids[:i])
            assert sequence.logprobs[i] == pytest.approx(float(expected[token]), abs=2e-4)
            best = expected.topk(4)
            possible = int((best.values > -torch.inf).sum())
            assert [token for token, _ in sequence.top_logprobs[i]] == best.indices.tolist()[:possible]
            assert [p for _, p in sequence.top_logprobs[i]] == pytest.approx(best.values.tolist()[:possible], abs=2e-4)


def test_a_logit_bias_is_of_one_request_only():
    model, prompts = lively_model(), some_prompts(6, 6)
    biased, plain = generate(model, prompts, [greedy(5, logit_bias=((50, 100.0),)), greedy(5)])
    assert biased.completion_ids == [50] * 5 and plain.completion_ids == plainly(model, prompts[1], 5)
    with pytest.raises(ValueError, match="logit_bias"):
        Engine(model).add([5], greedy(5, logit_bias=((model.config.vocab_size, 1.0),)))


def test_the_same_seed_draws_the_same_whatever_the_neighbours():
    model, prompts = lively_model(), some_prompts(4, 11, 7)
    sampling = free(24, seed=5)
    drawn = answers(model, prompts, sampling)
    assert answers(model, prompts, sampling) == drawn
    assert answers(model, prompts, sampling, max_batch=1) == drawn
    assert answers(model, prompts[:1], sampling) == drawn[:1]
    assert answers(model, [prompts[0], *some_prompts(1, 30, 2)], sampling)[0] == drawn[0]
    assert answers(model, prompts, replace(sampling, seed=6)) != drawn
    assert answers(model, [prompts[1]], replace(sampling, seed=6)) == drawn[1:2]  # prompt i draws with seed + i


@pytest.mark.parametrize("wrong", [
    {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2},
    {"repetition_penalty": 0}, {"presence_penalty": float("inf")}, {"max_new_tokens": 0}, {"stop": ("",)},
    {"stop": "text"}, {"top_logprobs": -1}], ids=str)
def test_a_value_out_of_range_is_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**wrong)
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_never_shows_half_a_character_nor_part_of_a_stop_string():
    dice, byte_token = random.Random(5), {TOKENIZER.token_bytes[i]: i for i in range(36, TOKENIZER.vocab_size)}
    for _ in range(300):
        text = "".join(dice.choices("aab 好北🙂é\n", k=dice.randrange(1, 25)))
        stops = tuple("".join(dice.choices("aab 好🙂", k=dice.randrange(1, 5))) for _ in range(dice.randrange(3)))
        whole = min((text.split(stop)[0] for stop in stops), key=len, default=text)
        whole_tokens = TOKENIZER.encode_text(text)
        byte_by_byte = [byte_token[bytes([byte])] for byte in text.encode()]
        sequence = Sequence([1], SamplingParams(100, stop=stops), TOKENIZER)
        for token in dice.choice([whole_tokens, byte_by_byte]):
            sequence.append_token(token, 0.0, [])
            assert whole.startswith(sequence.text)
            whole_characters = TOKENIZER.decode(sequence.completion_ids).rstrip("\N{REPLACEMENT CHARACTER}")
            held = len(whole_characters) - len(sequence.text)
            assert held < max(map(len, stops), default=1) or sequence.finish_reason  # no longer than it must
            if sequence.finish_reason:
                break
        else:
            sequence.append_token(EOS, 0.0, [])
        assert sequence.text == whole and sequence.finish_reason == "stop"


def test_half_a_character_is_left_out_at_the_end_and_before_a_special_token():
    (a,), (b,), call = TOKENIZER.encode_text("a"), TOKENIZER.encode_text("b"), SPECIAL_TOKENS["<tool_call>"]
    first_byte = TOKENIZER.token_bytes.index("好".encode()[:1])
    sequence = Sequence([1], SamplingParams(5, stop=("</think>",)), TOKENIZER)
    for token in (a, first_byte, call, b, first_byte):
        sequence.append_token(token, 0.0, [])
    assert sequence.output_pieces == ["a", call, "b"] and sequence.text == "ab"
    assert sequence.finish_reason == "length"
    sequence = Sequence([1], SamplingParams(4, stop=("</think>",)), TOKENIZER)
    sequence.append_token(SPECIAL_TOKENS["</think>"], 0.0, [])
    assert (sequence.finish_reason, sequence.output_pieces) == ("stop", [])


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(lively_model()).add([5], SamplingParams(stop=("x",)))


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


def test_a_chat_and_a_server_compile_before_the_first_question(evaluate, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    compile_by(counter, monkeypatch)
    assert evaluate("--prompt=Who are you?", "--use_compile=1").strip() == TALK[1]["content"]
    assert counter.frame_count == 1  # a chat has one row
    EngineThread(partial(Engine, lively_model(), max_batch=4, compile=True))
    assert counter.frame_count == 3


def test_a_pretrained_weight_goes_on_with_the_text(evaluate):
    assert evaluate("--weight=pretrain", f"--prompt={TEXT[0]}").strip() == TEXT[1].strip()


def test_a_stop_string_ends_the_answer_before_it(folder):
    model, _ = load_weight("full_sft", folder)
    prompt = TOKENIZER.prompt(TALK[:1])
    engine = Engine(model.eval(), TOKENIZER)
    sequence = engine.add(prompt, SamplingParams(40, temperature=0, stop=("l model",)))
    states = [(sequence.text, delta.finish_reason) for delta in engine.stream(sequence)]
    assert states[-1] == ("A very smal", "stop")
    assert all("A very smal".startswith(text) and reason is None for text, reason in states[:-1])


@pytest.mark.parametrize(("flags", "remembered"), [
    ([], TALK[:2]), (["--historys=0"], []), (["--history=2"], TALK[:2]), (["--historys=1"], TALK[1:2])])
def test_history_is_the_last_messages(evaluate, prompts, flags, remembered):
    question = TALK[0]["content"]
    evaluate(*flags, lines=[question, question, "/exit"])
    assert prompts[1] == TOKENIZER.prompt([*remembered, TALK[0]])


def test_a_conversation_that_became_too_long_is_told_and_can_be_cleared(evaluate, capsys):
    out = evaluate(lines=["so " * 40000, "/clear", "Who are you?", "/exit"])
    assert "leaves no room for an answer" in out and TALK[1]["content"] in out


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
        [HELP, TALK[1]["content"], TALK[3]["content"], TALK[3]["content"]])


def test_ctrl_c_ends_an_answer_but_not_the_program(evaluate, monkeypatch):
    step, steps, tuners = Engine.step, itertools.count(), set()

    def interrupted(engine):
        tuners.add(engine.threads)
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    out = evaluate(lines=["Who are you?", KeyboardInterrupt, "/clear", "And now?", "/exit"])
    first, second = TALK[1]["content"], TALK[3]["content"]
    assert second in out and first not in out
    assert out.split(" …")[0].removeprefix(HELP).strip() in first
    assert out.count(HELP) == 2  # at the start, and when there was no answer to stop
    assert len(tuners) == 1  # a new one would take the threads in use now for all there are


def test_what_the_chat_has_to_say_of_threads_comes_after_the_answer(evaluate, monkeypatch, capsys):
    step, printed = Engine.step, []

    def busy(engine):
        engine.threads.announce("fewer threads")
        return step(engine)

    monkeypatch.setattr(Engine, "step", busy)
    monkeypatch.setattr(eval_llm, "notice", lambda text: printed.append((text, capsys.readouterr().out)))
    evaluate(lines=["Who are you?", "/exit"])
    assert printed[0][0] == "fewer threads" and TALK[1]["content"] in printed[0][1]
