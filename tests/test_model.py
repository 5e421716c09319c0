"""The decoder against transformers' own Qwen3 and Qwen3-MoE with the same weights, and against itself run plainly."""

import copy
import math
import os
import shutil
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch._inductor import config as inductor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dataset.prefix_sharing import pack_shared_prefix
from model import attention as attention_module
from model import model_minimind as mm
from model import moe
from model.attention import BatchLayout, attention, document_mask, has_flash
from model.model_lora import LoRAConfig, apply_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_reward import MiniMindForSequenceClassification
from model.moe import EXPERT_WEIGHTS, TokenGroups, _grouped_mm, _linear_per_expert
from model.transformers_io import register
from trainer.losses import model_inputs

same = partial(assert_close, atol=1e-4, rtol=0)
same_gradient = partial(assert_close, atol=1e-5, rtol=1e-4)
exactly = partial(assert_close, atol=0, rtol=0)

SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 80, "router_aux_loss_coef": 0.1}
KINDS = {
    "dense": {},
    "dense-wide-heads": {"head_dim": 24},
    "moe-top1": {"use_moe": True},
    "moe-top1-normalised": {"use_moe": True, "norm_topk_prob": True},
    "moe-top2": {"use_moe": True, "num_experts_per_tok": 2},
    "moe-top2-normalised": {"use_moe": True, "num_experts_per_tok": 2, "norm_topk_prob": True},
}
YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1,
        "attention_factor": 1.0, "rope_theta": 1e6}

every_kind = pytest.mark.parametrize("kind", KINDS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
dense_and_moe = pytest.mark.parametrize("kind", ["dense", "moe-top2"])


def minimind(kind: str = "dense", device: str = "cpu", **options) -> MiniMindForCausalLM:
    """A small model whose weights are large enough that routing, attention and norms are far from trivial."""
    model = MiniMindForCausalLM(MiniMindConfig(**{**SMALL, **KINDS[kind], **options})).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model


def qwen3_config(config: MiniMindConfig):
    """The same sizes in transformers' words."""
    kind = transformers.Qwen3MoeConfig if config.use_moe else transformers.Qwen3Config
    sizes = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    rope = YARN if config.inference_rope_scaling else {"rope_type": "default", "rope_theta": config.rope_theta}
    return kind(**sizes, rope_parameters=rope, output_router_logits=config.use_moe)


def twins(kind: str, device: str = "cpu", **options):
    """Our model and transformers' with the same weights."""
    ours = minimind(kind, device, **options)
    qwen3 = transformers.Qwen3MoeForCausalLM if ours.config.use_moe else transformers.Qwen3ForCausalLM
    theirs = qwen3(qwen3_config(ours.config)).to(device)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def tokens(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(3, SMALL["vocab_size"], shape, device=device)


def padding_mask(side: str, device: str) -> torch.Tensor | None:
    """Three rows of 12 with 0, 3 and 7 positions of padding."""
    position = torch.arange(12, device=device)
    padding = torch.tensor([[0], [3], [7]], device=device)
    return {"none": None, "left": (position >= padding).long(), "right": (position < 12 - padding).long()}[side]


# --- one pass over whole rows


@every_kind
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_losses_and_gradients_equal_qwen3(kind, side, device):
    ours, theirs = twins(kind, device)
    ids, mask = tokens(3, 12, device=device), padding_mask(side, device)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    after_padding = F.pad(~real[:, :-1], (1, 0))  # the first real token after padding is predicted by padding
    labels = ids.masked_fill(~real | after_padding, -100)
    our, their = (model(ids, attention_mask=mask, labels=labels) for model in (ours, theirs))
    same(our.logits[real], their.logits[real])
    same_gradient(our.loss, their.loss)
    if ours.config.use_moe:
        same_gradient(our.aux_loss, their.aux_loss)
    our.loss.backward()
    their.loss.backward()
    same_gradient(gradients(ours), gradients(theirs))


@dense_and_moe
def test_chosen_logits_are_rows_of_all_logits(kind, device):
    model, ids = minimind(kind, device), tokens(2, 9, device=device)
    full, at = model(ids).logits, torch.tensor([0, 4, 9, 17], device=device)
    same(model(ids, logits_indices=at).logits, full.flatten(0, 1)[at])
    for keep in (1, 3, torch.tensor([0, 5], device=device)):
        same(model(ids, logits_to_keep=keep).logits, full[:, -keep:] if isinstance(keep, int) else full[:, keep])


# --- with a cache


@every_kind
@pytest.mark.parametrize("chunks", [[6, 1, 1, 1, 1, 1, 1], [1] * 12, [5, 4, 3]], ids=["prefill", "single", "chunked"])
def test_cached_pieces_equal_one_full_pass_of_qwen3(kind, chunks, device):
    ours, theirs = twins(kind, device)
    ids, cache, logits = tokens(2, 12, device=device), None, []
    for piece in ids.split(chunks, dim=1):
        out = ours(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert cache.get_seq_length() == 12
    same(torch.cat(logits, dim=1), theirs(ids).logits)


@every_kind
@pytest.mark.parametrize("side", ["none", "left"])
def test_greedy_generation_equals_qwen3(kind, side, device):
    ours, theirs = twins(kind, device)
    theirs.config.output_router_logits = False  # transformers cannot generate with it
    mask = padding_mask(side, device)
    prompt = {"inputs": tokens(3, 12, device=device), "attention_mask": mask}
    options = {"do_sample": False, "max_new_tokens": 10, "no_repeat_ngram_size": 1}  # or it says one token forever
    our, their = (model.generate(**prompt, **options) for model in (ours, theirs))
    assert our.shape == (3, 22)
    exactly(our, their)


def test_left_padded_cached_steps_equal_the_row_alone(device):
    model, ids, mask = minimind(device=device), tokens(1, 12, device=device), padding_mask("left", device)[2:]
    alone = model(ids[:, 7:]).logits
    cache, position = transformers.DynamicCache(config=model.config), (mask.cumsum(1) - 1).clamp(min=0)
    steps = [model(ids[:, a:b], mask[:, :b], position[:, a:b], past_key_values=cache).logits
             for a, b in ((0, 9), (9, 11), (11, 12))]
    same(torch.cat(steps, dim=1)[:, 7:], alone)


# --- keywords of transformers


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_accepted_under_both_names(name):
    model, ids, cache = minimind(), tokens(2, 7), transformers.DynamicCache()
    logits = [model(piece, **{name: cache}).logits for piece in ids.split([4, 3], dim=1)]
    same(torch.cat(logits, dim=1), model(ids).logits)


@dense_and_moe
def test_a_loss_over_the_items_of_accumulated_batches_equals_qwen3(kind):
    ours, theirs = twins(kind)
    ids = tokens(2, 9)
    our, their = (model(ids, labels=ids, num_items_in_batch=torch.tensor(50)).loss for model in (ours, theirs))
    same(our, their)
    assert our < ours(ids, labels=ids).loss / 2


def test_keywords_that_ask_for_nothing_are_ignored_and_others_are_refused():
    model, ids = minimind(), tokens(1, 5)
    ignored = {"output_attentions": False, "output_hidden_states": None, "inputs_embeds": None, "return_dict": True,
               "cache_position": torch.arange(5)}
    exactly(model(ids, **ignored).logits, model(ids).logits)
    for keywords in ({"output_attentions": True}, {"inputs_embeds": torch.ones(1, 5, 64)}, {"position_id": ids}):
        for decoder in (model, model.model, MiniMindForSequenceClassification(model.config)):
            with pytest.raises(TypeError, match=f"does not know {next(iter(keywords))}$"):
                decoder(ids, **keywords)


# --- packed rows


LENGTHS = [[5, 1, 10], [3, 6, 7]]  # of the documents in two rows of 16


def packed(device: str = "cpu", lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """Two rows full of documents, with empty documents between: the first label of each document is not trained."""
    first, second = lengths
    cu_seqlens = F.pad(torch.tensor(first + second).cumsum(0), (1, 0)).repeat_interleave(2).int()
    position = torch.cat([torch.arange(n) for n in first + second]).view(2, 16)
    ids = tokens(2, 16)
    labels = ids.masked_fill(position == 0, -100)
    batch = {"input_ids": ids, "position_ids": position, "labels": labels}
    return {name: x.to(device) for name, x in batch.items()} | {"layout": BatchLayout(cu_seqlens=cu_seqlens.to(device))}


def masked(batch: dict) -> dict:
    """The same with a mask in place of the bounds: the path of a machine without a kernel for documents."""
    mask = document_mask(batch["layout"].cu_seqlens, *batch["input_ids"].shape)
    return {name: x for name, x in batch.items() if name != "layout"} | {"attention_mask": mask}


def documents(batch: dict) -> list[torch.Tensor]:
    return batch["input_ids"].flatten().split(LENGTHS[0] + LENGTHS[1])


@every_kind
@pytest.mark.parametrize("bounds", [dict, masked], ids=["cu_seqlens", "document_mask"])
def test_packed_documents_equal_qwen3_on_each_alone(kind, bounds, device):
    ours, theirs = twins(kind, device, router_aux_loss_coef=0.0)
    batch = packed(device)
    out = ours(**bounds(batch))
    alone = [theirs(document[None], labels=document[None]) for document in documents(batch)]
    same(out.logits.flatten(0, 1), torch.cat([x.logits[0] for x in alone]))
    weights = [len(document) - 1 for document in documents(batch)]
    loss = sum(x.loss * n for x, n in zip(alone, weights, strict=True) if n) / sum(weights)
    same_gradient(out.loss, loss)
    out.loss.backward()
    loss.backward()
    same_gradient(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("kind", ["moe-top1", "moe-top2-normalised"])
def test_balancing_loss_of_packed_documents_equals_qwen3_on_a_padded_batch(kind, device):
    ours, theirs = twins(kind, device)
    batch = packed(device)
    token_mask = torch.ones_like(batch["input_ids"])
    token_mask[1, 9:] = 0  # the last document is padding of the packed row
    batch["layout"] = batch["layout"]._replace(token_mask=token_mask)
    batch["labels"][1, 9:] = -100
    rows = torch.nn.utils.rnn.pad_sequence(documents(batch)[:-1], batch_first=True, padding_value=-100)
    our, their = ours(**batch), theirs(rows.clamp(min=0), attention_mask=(rows >= 0).long(), labels=rows)
    same_gradient((our.loss, our.aux_loss), (their.loss, their.aux_loss))
    our.loss.backward()
    their.loss.backward()
    same_gradient(gradients(ours), gradients(theirs))


def prompt_groups() -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of other lengths, each with answers, one of a single token."""
    return [(tokens(1, prompt)[0].tolist(), [tokens(1, n)[0].tolist() for n in lengths])
            for prompt, lengths in ((7, (5, 1, 9)), (1, (4,)), (12, (2, 6)))]


@every_kind
def test_answers_that_share_their_prompt_equal_qwen3_on_each_conversation_alone(kind, device):
    (ours, theirs), groups = twins(kind, device), prompt_groups()
    batch = {name: x.to(device) for name, x in pack_shared_prefix(groups, 64).items()}
    assert int(batch["attention_mask"].sum()) == 7 + 12 + 1 + 3 + 12 + 6  # a prompt once, no answer's last token
    targets = batch["targets"]
    assert targets.tolist() == sum((answer for _, answers in groups for answer in answers), [])
    out = ours(**model_inputs(batch))
    if ours.config.use_moe:  # padding has no part in it
        more_padding = {name: x.to(device) for name, x in pack_shared_prefix(groups, 99).items()}
        same(out.aux_loss, ours(**model_inputs(more_padding)).aux_loss)
    log_p = -F.cross_entropy(out.logits, targets, reduction="none")
    alone = []
    for prompt, answers in groups:
        for answer in answers:
            logits = theirs(torch.tensor([prompt + answer], device=device)).logits[0, len(prompt) - 1:-1]
            alone.append(-F.cross_entropy(logits, torch.tensor(answer, device=device), reduction="none"))
    same(log_p, torch.cat(alone))
    weight = torch.linspace(-1, 1, len(targets), device=device)
    (log_p * weight).sum().backward()
    (torch.cat(alone) * weight).sum().backward()
    same_gradient(gradients(ours), gradients(theirs))


@dense_and_moe
@pytest.mark.parametrize("bounds", [dict, masked], ids=["cu_seqlens", "document_mask"])
def test_a_token_never_reaches_another_document(kind, bounds, device):
    model, batch = minimind(kind, device), packed(device)
    before = model(**bounds(batch)).logits
    batch["input_ids"][1, 4] = 2  # in the middle document of the second row, which has places 3 to 8
    after = model(**bounds(batch)).logits
    changed = torch.zeros(2, 16, dtype=torch.bool, device=device)
    changed[1, 4:9] = True
    (exactly if kind == "dense" else same)(after[~changed], before[~changed])  # experts see other batch sizes
    assert ((after - before)[changed].abs().amax(-1) > 1e-3).all()


def heads(device: str, dtype=torch.float32):
    q, k, v = (torch.randn(2, 48, n, 16, device=device, dtype=dtype) for n in (4, 2, 2))
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("name, dtype, tolerance", [
    ("cpu", torch.float32, 1e-5),
    pytest.param("cuda", torch.bfloat16, 3e-2, marks=needs_gpu),
], ids=["loop", "flash"])
def test_attention_within_bounds_equals_attention_under_the_document_mask(name, dtype, tolerance):
    bounds = torch.tensor([0, 5, 6, 6, 48, 81, 96], dtype=torch.int32, device=name)  # 33 and 42 tokens: padded on a CPU
    qkv = heads(name, dtype)
    direction = torch.randn_like(qkv[0])
    by_mask = attention(*qkv, BatchLayout(document_mask(bounds, 2, 48)))
    by_bounds = attention(*qkv, BatchLayout(cu_seqlens=bounds))
    assert_close(by_bounds, by_mask, atol=tolerance, rtol=tolerance)
    ours, theirs = (torch.autograd.grad(out, qkv, direction) for out in (by_bounds, by_mask))
    assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_attention_to_shared_prompts_equals_attention_under_the_document_mask():
    rows = [pack_shared_prefix(prompt_groups(), 48) for _ in range(2)]
    num_tokens = len(rows[0]["expand_index"])
    cu_seqlens = torch.cat((rows[0]["cu_seqlens"], rows[1]["cu_seqlens"][1:] + num_tokens))
    expand_index, gather_index = (torch.cat((rows[0][name], rows[1][name] + offset)) for name, offset in (
        ("expand_index", 48), ("gather_index", num_tokens)))
    q, k, v = (torch.randn(2, 48, n, 16) for n in (4, 2, 2))
    by_mask = attention(q, k, v, BatchLayout(document_mask(cu_seqlens, 2, 48, expand_index, gather_index)))
    same(attention(q, k, v, BatchLayout(None, None, cu_seqlens, expand_index, gather_index)), by_mask)


@pytest.mark.parametrize("head_dim", [12, 16])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_repeated_and_padded_heads_change_nothing(dtype, tolerance, head_dim):
    q, k, v = (torch.randn(2, n, 9, head_dim, dtype=dtype) for n in (4, 2, 2))
    mask = document_mask(torch.tensor([0, 4, 9, 18], dtype=torch.int32), 2, 9)
    for attn_mask in (mask, None):
        with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as kernel:
            out = attention_module._memory_efficient(q, k, v, attn_mask)
        assert [x.shape[1] for x in kernel.call_args.args] == [4, 4, 4]  # what its CUDA kernel asks for
        assert dtype == torch.float32 or all(x.shape[-1] % 8 == 0 for x in kernel.call_args.args)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=attn_mask is None, enable_gqa=True)
        assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_flash_attention_is_for_cards_and_builds_that_have_it(monkeypatch):
    def fits(capability: tuple[int, int] = (8, 0), built: bool = True, dtype=torch.bfloat16, head_dim: int = 96,
             device: str = "cuda") -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
        return has_flash(torch.device(device), dtype, head_dim)

    assert fits() and fits((12, 0), dtype=torch.float16, head_dim=256)
    assert not fits((7, 5), dtype=torch.float16)  # T4, 2080 Ti
    assert not fits(built=False)  # Windows
    assert not fits(dtype=torch.float32) and not fits(head_dim=264) and not fits(device="cpu")


def test_empty_documents_change_nothing(device):
    model, batch = minimind(device=device), packed(device)
    repeated = model(**batch).logits
    bounds = batch["layout"].cu_seqlens
    once = model(**batch | {"layout": BatchLayout(cu_seqlens=bounds.unique())}).logits
    assert len(bounds) > len(bounds.unique())
    exactly(repeated, once)


# --- positions


@pytest.mark.parametrize("head_dim", [16, 64, 96])
@pytest.mark.parametrize("scaling", [False, True], ids=["plain", "yarn"])
def test_rotary_frequencies_equal_transformers(head_dim, scaling):
    config = MiniMindConfig(**SMALL, head_dim=head_dim, inference_rope_scaling=scaling)
    theirs = Qwen3RotaryEmbedding(qwen3_config(config))
    same(mm.rope_frequencies(config), theirs.inv_freq, atol=2e-9)  # position 32767 multiplies any rounding
    assert theirs.attention_scaling == 1


@pytest.mark.parametrize("head_dim", [16, 64, 96])
@pytest.mark.parametrize("scaling", [False, True], ids=["plain", "yarn"])
def test_logits_far_beyond_the_trained_length_equal_qwen3(head_dim, scaling, device):
    ours, theirs = twins("dense", device, head_dim=head_dim, inference_rope_scaling=scaling)
    ids = tokens(2, 12, device=device)
    far = torch.tensor([0, 1, 40, 700, 2047, 2048, 2049, 4100, 9000, 17000, 32766, 32767], device=device).expand(2, -1)
    our, their = (model(ids, torch.ones_like(ids), far).logits for model in (ours, theirs))
    same(our, their, atol=1e-4 if device == "cpu" else 1e-3)  # a GPU rounds θ^x differently, times 32767


# --- sizes


def sizes(**options) -> tuple[float, float]:
    """Millions of parameters: all, and those one token meets."""
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**options))
    config, total = model.config, sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total / 1e6, (total - experts * (1 - config.num_experts_per_tok / config.num_experts)) / 1e6


def test_published_sizes():
    assert sizes() == pytest.approx((63.91, 63.91), abs=5e-3)
    assert sizes(use_moe=True) == pytest.approx((198.42, 63.94), abs=5e-3)


def test_one_of_four_experts_costs_what_the_dense_model_costs():
    def flops(kind):
        with FlopCounterMode(display=False) as counter:
            minimind(kind, moe_intermediate_size=96)(tokens(1, 8))
        return counter.get_total_flops()

    router = 2 * 8 * (64 + 2) * 4 * 2  # multiply and add, tokens, hidden size and two sums of balance, experts, layers
    assert flops("moe-top1") == flops("dense") + router


def test_head_is_tied_to_the_embedding():
    model = minimind()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("options, message", [
    ({"hidden_size": 100}, "hidden_size 100 .* 8 attention heads"),
    ({"num_key_value_heads": 3}, "8 query heads .* 3 key-value heads"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 .* num_experts 4"),
    ({"head_dim": 15}, "head_dim 15 is odd"),
    ({"hidden_size": 72}, "head_dim 9 is odd"),
])
def test_sizes_that_do_not_fit_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        MiniMindConfig(**options)


@pytest.mark.parametrize("hidden_size, layers, width, millions", [(512, 8, 1408, 25.83), (768, 16, 2048, 104.03)])
def test_historical_sizes_learn(hidden_size, layers, width, millions, device):
    config = MiniMindConfig(hidden_size, layers, num_key_value_heads=2, intermediate_size=width)
    model, ids = MiniMindForCausalLM(config).to(device), torch.randint(3, 6400, (1, 24), device=device)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    loss = model(ids, labels=ids).loss
    assert loss.item() == pytest.approx(math.log(6400), abs=0.5)
    loss.backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model).values())


# --- experts


def test_experts_without_a_token_have_a_zero_gradient(device):
    model = minimind("moe-top1", device)
    model(tokens(1, 1, device=device)).logits.sum().backward()
    for layer in model.model.layers:
        for parameter in layer.mlp.experts.parameters():
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.flatten(1).any(1).sum() == 1


def routed(device: str, dtype=torch.float32):
    """Experts, tokens, two choices of each and their weights; nobody chooses the last expert."""
    experts = minimind("moe-top2", device).to(dtype).model.layers[0].mlp.experts
    choice = torch.stack([torch.randperm(3)[:2] for _ in range(20)]).to(device)
    return experts, torch.randn(20, 64, device=device, dtype=dtype), choice, torch.rand(20, 2, device=device)


def test_stacked_experts_equal_a_plain_loop(device):
    experts, x_ND, expert_NK, weight_NK = routed(device)

    def swiglu(x, e):
        gate, up = experts.gate_up_proj[e].split(80)
        return experts.down_proj[e] @ (F.silu(gate @ x) * (up @ x))

    rows = zip(x_ND, expert_NK, weight_NK, strict=True)
    plain = [sum(w * swiglu(x, e) for e, w in zip(chosen, weight, strict=True)) for x, chosen, weight in rows]
    same(experts(x_ND, expert_NK, weight_NK), torch.stack(plain))


def test_few_tokens_that_go_to_all_experts_get_the_results_of_theirs(device, monkeypatch):
    experts, x_ND, expert_NK, weight_NK = routed(device)
    expected = experts(x_ND, expert_NK, weight_NK)
    experts.gate_up_proj.data[3] = torch.inf  # nobody chooses it, so it must spoil nothing
    monkeypatch.setattr(moe, "use_dense_experts", lambda *_: True)
    monkeypatch.setattr(moe, "TokenGroups", lambda *_: pytest.fail("the host counted"))
    same(experts(x_ND, expert_NK, weight_NK), expected)


def test_which_experts_take_all_tokens(monkeypatch):
    assert not moe.use_dense_experts(torch.zeros(1, 8))
    assert moe.use_dense_experts(torch.zeros(256, 8, device="meta"))
    assert not moe.use_dense_experts(torch.zeros(257, 8, device="meta"))
    for capability, one_kernel in (((9, 0), True), ((10, 0), True), ((8, 6), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, capability=capability: capability)
        assert moe.can_use_grouped_mm("cuda", torch.bfloat16, 8) == one_kernel
        assert not moe.can_use_grouped_mm("cuda", torch.float16, 8)


def test_a_step_with_a_cache_computes_no_load_balancing_loss(monkeypatch):
    model, ids = minimind("moe-top2"), tokens(2, 12)
    assert model(ids).aux_loss is not None
    monkeypatch.setattr(mm, "router_stats", lambda *_: pytest.fail("it is only for training"))
    out = model(ids, use_cache=True)
    assert out.aux_loss is None
    model(ids[:, :1], past_key_values=out.past_key_values)


def test_the_host_counts_tokens_once_per_layer(monkeypatch):
    counted, model = [], minimind("moe-top2")
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: counted.append(x.shape) or tolist(x))
    apply_lora(model, LoRAConfig(rank=4, targets=EXPERT_WEIGHTS))
    model(tokens(2, 9)).logits.sum().backward()
    assert counted == [torch.Size([4])] * 2


def test_grouped_product_equals_the_loop_over_experts(device):
    experts, x_ND, *_ = routed(device, torch.bfloat16)
    load, weight = torch.tensor([4, 9, 7, 0], device=device), experts.gate_up_proj
    grouped, loop = _grouped_mm(x_ND, weight, load), _linear_per_expert(x_ND, weight, TokenGroups(load))
    close, direction = partial(assert_close, atol=2e-2, rtol=2e-2), torch.randn_like(loop)
    close(grouped, loop)
    close(*(torch.autograd.grad(y, weight, direction) for y in (grouped, loop)))


def test_weights_with_published_expert_names_load_strictly(tmp_path):
    stacked, theirs = twins("moe-top2")
    theirs.save_pretrained(tmp_path)  # transformers writes one entry an expert and matrix, as published MiniMind-3 has
    published = load_file(tmp_path / "model.safetensors")
    published["lm_head.weight"] = published["model.embed_tokens.weight"]
    assert {f"model.layers.1.mlp.experts.3.{x}_proj.weight" for x in ("gate", "up", "down")} < published.keys()
    opened, ids = minimind("moe-top2"), tokens(1, 8)
    opened.load_state_dict(published, strict=True)
    exactly(opened(ids).logits, stacked(ids).logits)


@pytest.mark.parametrize("kind, learns", [("moe-top1", True), ("moe-top1-normalised", False), ("moe-top2", True),
                                          ("moe-top2-normalised", True)])
def test_router_learns_from_language_unless_the_only_weight_is_normalised_to_one(kind, learns, device):
    model, ids = minimind(kind, device, router_aux_loss_coef=0.0), tokens(2, 12, device=device)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        largest = layer.mlp.gate.weight.grad.abs().max()
        assert largest > 1e-3 if learns else largest < 1e-7  # only the rounding of 1/w - w/w² is left


# --- files


@every_kind
def test_saved_model_opens_by_auto_class_with_equal_bits(kind, tmp_path):
    register()
    model, ids = minimind(kind, inference_rope_scaling=True).eval(), tokens(2, 12)
    model.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is MiniMindForCausalLM
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    exactly(opened.state_dict(), model.state_dict())
    same(opened(ids).logits, model(ids).logits)  # a file's memory is aligned otherwise, and so products round otherwise


SWITCHES = ("use_moe", "norm_topk_prob", "qk_norm", "inference_rope_scaling", "tie_word_embeddings")


@pytest.mark.parametrize("options", [
    {},
    {"use_moe": True, "norm_topk_prob": True, "num_experts_per_tok": 2, "num_experts": 6},
    {"inference_rope_scaling": True, "head_dim": 48, "rope_theta": 1e4, "hidden_size": 512},
    {"use_moe": 1, "norm_topk_prob": 1, "qk_norm": 1, "inference_rope_scaling": 0, "tie_word_embeddings": 0},
], ids=["default", "moe", "yarn", "flags"])
def test_config_survives_a_round_trip_with_switches_as_bools(options, tmp_path):
    config = MiniMindConfig(**options)
    assert all(isinstance(getattr(config, name), bool) for name in SWITCHES)  # transformers' configs take no 0 or 1
    config.save_pretrained(tmp_path)
    opened = MiniMindConfig.from_pretrained(tmp_path)
    assert opened.to_dict() == config.to_dict()
    assert {name: getattr(opened, name) for name in options} == options


# --- precision and compilation


@every_kind
def test_bf16_autocast_stays_near_fp32(kind, device):
    model, batch = minimind(kind, device), packed(device)
    exact = model(**batch)
    with torch.autocast(device, torch.bfloat16):
        rough = model(**batch)
    rough.loss.backward()
    assert rough.logits.dtype == torch.bfloat16 and rough.loss.dtype == torch.float32
    assert F.cosine_similarity(rough.logits.float(), exact.logits, dim=-1).median() > 0.99
    same(rough.loss, exact.loss, atol=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.parametrize("kind, backend", [("dense", "inductor"), ("moe-top2", "aot_eager")])  # inductor costs 20 s
@inductor.patch({"cpp.vec_isa_ok": True})  # and 12 s more if it may probe the CPU
def test_compiled_blocks_equal_plain_ones_and_compile_once_for_all_document_bounds(kind, backend, device):
    plain = minimind(kind, device)
    compiled = copy.deepcopy(plain)
    for layer in compiled.model.layers:
        layer.compile(dynamic=False, backend=backend)
    for lengths, stance in ((LENGTHS, "default"), ([[2, 8, 6], [11, 1, 4]], "fail_on_recompile")):
        batch = packed(device, lengths)
        with torch.compiler.set_stance(stance):
            losses = [model(**batch).loss for model in (compiled, plain)]
            sum(losses).backward()
        same(*losses)
        same(gradients(compiled), gradients(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_rows_go_through_flash_attention_on_a_cpu(dtype):
    """Whatever layout the products leave their results in; else memory grows with the square of the length."""
    q, k, v = (torch.randn(1, heads, 32, 40, dtype=dtype).transpose(2, 3) for heads in (4, 2, 2))  # [B, H, T, D]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, H, D], the numbers of a head apart
    with torch.inference_mode(), torch.profiler.profile() as profile:
        out = attention(q, k, v, BatchLayout())
    assert out.shape == q.shape
    assert "aten::_scaled_dot_product_attention_math" not in {event.key for event in profile.key_averages()}
