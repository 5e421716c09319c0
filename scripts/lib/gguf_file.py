"""A model → one GGUF file for llama.cpp and the programs built on it (Ollama, LM Studio, …), and Ollama's Modelfile.

Written with the names and the metadata that llama.cpp's `qwen3` and `qwen3moe` read. `qwen3moe` always lets the weights
of the chosen experts sum to 1. A MoE that weights by the raw router probability is therefore written as `bailingmoe2`,
which has a switch for it and differs only by one more expert that is always on: its weights are zeros.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from torch import Tensor

from model.chat import BOS, EOS, PAD, TOKENIZER_DIR, ChatTokenizer
from model.cli import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.transformers_io import chat_template

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
              "q4_0": "MOSTLY_Q4_0"}
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
BLOCK = 32  # weights that share a scale in q8_0 and q4_0; also the width of the expert of zeros


def architecture(config: MiniMindConfig) -> str:
    """llama.cpp's name of the architecture. Raises UserError for MiniMind2's models."""
    if config.n_shared_experts or not config.qk_norm:
        raise UserError("--format gguf writes Qwen3, which has QK-norm and no shared experts, unlike MiniMind2; write "
                        "--format transformers (Llama) and convert that with llama.cpp's convert_hf_to_gguf.py")
    if not config.use_moe:
        return "qwen3"
    return "qwen3moe" if config.norm_topk_prob else "bailingmoe2"


def layout(model: MiniMindForCausalLM) -> Iterator[tuple[str, list[Tensor]]]:
    """The tensors of the file: name, and the parameters, or parts of them, that are concatenated in it."""
    config, raw = model.config, architecture(model.config) == "bailingmoe2"
    yield "token_embd", [model.model.embed_tokens.weight]
    yield "output_norm", [model.model.norm.weight]
    if raw or not config.tie_word_embeddings:
        yield "output", [model.lm_head.weight]
    for i, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        parts = {"attn_norm": block.input_layernorm, "attn_q_norm": attention.q_norm, "attn_k_norm": attention.k_norm,
                 "attn_output": attention.o_proj, "ffn_norm": block.post_attention_layernorm}
        projections = {"attn_q": attention.q_proj, "attn_k": attention.k_proj, "attn_v": attention.v_proj}
        if raw:
            yield f"blk.{i}.attn_qkv", [module.weight for module in projections.values()]
        else:
            parts |= projections
        if config.use_moe:
            gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
            parts["ffn_gate_inp"] = mlp.gate
            yield from ((f"blk.{i}.ffn_{name}_exps", [value]) for name, value in
                        {"gate": gate, "up": up, "down": mlp.experts.down_proj}.items())
        else:
            parts |= {"ffn_gate": mlp.gate_proj, "ffn_up": mlp.up_proj, "ffn_down": mlp.down_proj}
        if raw:
            zeros = torch.zeros(BLOCK, config.hidden_size)
            yield from ((f"blk.{i}.ffn_{name}_shexp", [value]) for name, value in
                        {"gate": zeros, "up": zeros, "down": zeros.T.contiguous()}.items())
        yield from ((f"blk.{i}.{name}", [module.weight]) for name, module in parts.items())


def tensor_type(name: str, value: Tensor, dtype: str) -> Kind:
    """The type of a tensor: fp32 for norms and routers, f16 instead of a quantised one where rows are no whole blocks.

    With q4_0, embedding and LM head are q8_0: they are shared by all tokens and lose most by rounding.
    """
    if value.dim() == 1 or name.endswith("ffn_gate_inp"):
        return Kind.F32
    if dtype in ("q8_0", "q4_0") and value.shape[-1] % BLOCK:
        return Kind.F16
    return KINDS["q8_0" if dtype == "q4_0" and name in ("token_embd", "output") else dtype]


def pre_tokenizer(settings: dict) -> str:
    """llama.cpp's name for the way a tokenizer.json splits text. Raises UserError where it has none."""
    split = settings.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space") and not settings["normalizer"]:
        if patterns == [QWEN2_SPLIT] and len(steps) == 2 and not steps[-1].get("use_regex", True):
            return "qwen2"
        if len(steps) == 1 and steps[-1].get("use_regex", True):
            return "gpt-2"
    raise UserError("--format gguf: llama.cpp has no name for the way this tokenizer splits text; it is neither that "
                    "of Qwen2 nor that of GPT-2")


def add_metadata(writer: gguf.GGUFWriter, **fields) -> None:
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: ChatTokenizer) -> None:
    settings = json.loads((tokenizer.folder / "tokenizer.json").read_text("utf-8"))
    added = {token["id"]: token for token in settings["added_tokens"]}
    names = {number: name for name, number in settings["model"]["vocab"].items()}
    names |= {number: token["content"] for number, token in added.items()}
    types = [TokenType.NORMAL if i not in added else TokenType.CONTROL if added[i]["special"] else
             TokenType.USER_DEFINED for i in range(len(names))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in settings["model"]["merges"]]
    add_metadata(writer, tokenizer_model="gpt2", tokenizer_pre=pre_tokenizer(settings), token_merges=merges,
                 token_list=[names[i] for i in range(len(names))], token_types=types, bos_token_id=BOS,
                 eos_token_id=EOS, pad_token_id=PAD, add_bos_token=False, chat_template=chat_template(tokenizer))


def write_gguf(model: MiniMindForCausalLM, path: Path, tokenizer: ChatTokenizer, dtype: str) -> None:
    """Write the model, its sizes and its tokenizer. `dtype`: a key of KINDS."""
    config, arch = model.config, architecture(model.config)
    if arch == "bailingmoe2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise UserError("--format gguf: llama.cpp takes raw router weights only where all query heads are together as "
                        "wide as the model")
    writer = gguf.GGUFWriter(path, arch)
    add_metadata(writer, name=path.stem, file_type=gguf.LlamaFileType[FILE_TYPES[dtype]], vocab_size=config.vocab_size,
                 context_length=config.max_position_embeddings, embedding_length=config.hidden_size,
                 block_count=config.num_hidden_layers, feed_forward_length=config.intermediate_size,
                 head_count=config.num_attention_heads, head_count_kv=config.num_key_value_heads,
                 key_length=config.head_dim, value_length=config.head_dim, rope_dimension_count=config.head_dim,
                 rope_freq_base=config.rope_theta, layer_norm_rms_eps=config.rms_norm_eps)
    if config.use_moe:
        add_metadata(writer, expert_count=config.num_experts, expert_used_count=config.num_experts_per_tok,
                     expert_feed_forward_length=config.moe_intermediate_size)
    if arch == "bailingmoe2":
        add_metadata(writer, expert_weights_norm=False, expert_gating_func=gguf.ExpertGatingFuncType.SOFTMAX,
                     expert_shared_count=1, expert_shared_feed_forward_length=BLOCK)
    add_tokenizer(writer, tokenizer)
    for name, parts in layout(model):
        value = torch.cat(parts, dim=max(parts[0].dim() - 2, 0)).detach().float().contiguous()
        kind = tensor_type(name, value, dtype)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def read_gguf(path: Path, config: MiniMindConfig) -> MiniMindForCausalLM:
    """The model that a file of `write_gguf` holds, in fp32."""
    model = MiniMindForCausalLM(config)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, parts in layout(model):
        tensor = stored.pop(f"{name}.weight")
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        dim = max(value.dim() - 2, 0)
        for part, chunk in zip(parts, value.split([part.shape[dim] for part in parts], dim), strict=True):
            part.copy_(chunk)
    assert not stored, f"{path} holds more: {list(stored)}"
    return model


def modelfile(name: str, num_ctx: int) -> str:
    """Ollama's Modelfile for a GGUF `name` in the same folder: the chat format in Go's template language, stops, and
    room for `num_ctx` tokens (Ollama's own default cuts at 4,096).

    Ollama finds the tags of thinking and of tool calls as the text around .Thinking and the first text in the first
    `if .ToolCalls`, which is why the newline between content and calls asks for $message.ToolCalls.
    """
    template = (TOKENIZER_DIR / "chat_template.gotmpl").read_text("utf-8")
    return (f'FROM ./{name}\nTEMPLATE """{template}"""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>"\n'
            f"PARAMETER temperature 0.85\nPARAMETER top_p 0.95\nPARAMETER num_ctx {num_ctx}\n"
            '# SYSTEM """A system prompt for every conversation that has none."""\n')
