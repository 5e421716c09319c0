"""Folders in transformers' format: read Qwen3 and Qwen3-MoE, write our models as these or as our own class.

A folder that was published with a chat template of its own is prompted by that template (`TemplateTokenizer`).
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from model import attention, linear, model_minimind, moe
from model.chat import (
    BOS,
    EOS,
    PAD,
    TOKENIZER_DIR,
    ChatTokenizer,
    check_continuable,
    content_text,
    parse_json,
    parse_tool_calls,
    render,
)
from model.cli import UserError, first_line
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import CONFIG_KEYS

MAX_PADDING = 512  # rows of an embedding that no token has: other projects round their number up
AUTO_MAP = {"AutoConfig": "model_minimind.MiniMindConfig", "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"}


def qwen3_config(config: MiniMindConfig, **options) -> PretrainedConfig:
    """Our configuration as that of transformers' Qwen3 or Qwen3-MoE, whose parameters have the same names.

    Of a model without QK-norm, as that of Llama. Raises UserError for shared experts, which none of them has.
    """
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    if config.n_shared_experts or config.use_moe and not config.qk_norm:
        raise UserError("transformers' Qwen3-MoE has QK-norm and no shared experts, unlike MiniMind2's MoE; "
                        "--format minimind and torch keep it as it is")
    omitted = {"model_type", "architectures", "auto_map", "use_moe", "inference_rope_scaling", "qk_norm",
               "n_shared_experts", "id2label", "label2id"}
    if not config.use_moe:  # engines treat every model whose config has expert fields as a MoE
        omitted |= {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
                    "router_aux_loss_coef"}
    values = {name: value for name, value in config.to_dict().items() if name not in omitted}
    if config.use_moe:  # SGLang reads the LM head of a Qwen3-MoE from its own weights
        values["tie_word_embeddings"] = False
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    config_class = Qwen3MoeConfig if config.use_moe else Qwen3Config if config.qk_norm else LlamaConfig
    return config_class(**values | options, rope_parameters=rope)


def minimind_config(config: PretrainedConfig) -> MiniMindConfig:
    """The configuration of a Qwen3, Qwen3-MoE or Llama as ours. Raises UserError for what our decoder lacks."""
    rope = getattr(config, "rope_parameters", None) or {}
    supported = {"model_type": ("qwen3", "qwen3_moe", "llama"), "hidden_act": ("silu",),
                 "attention_bias": (False,), "mlp_bias": (False,),
                 "use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
    unsupported = [f"{name} {getattr(config, name)}" for name, values in supported.items()
                   if getattr(config, name, values[0]) not in values]
    if not unsupported and rope.get("rope_type", "default") != "default":
        unsupported = [f"rope_type {rope['rope_type']}"]
    if unsupported:
        raise UserError(f"unsupported model: {', '.join(unsupported)}; it reads Qwen3, Qwen3-MoE and "
                        "Llama as published")
    values = {name: getattr(config, name) for name in CONFIG_KEYS if hasattr(config, name)}
    return MiniMindConfig(**values | {"use_moe": config.model_type == "qwen3_moe", "rope_theta": rope["rope_theta"],
                                      "qk_norm": config.model_type != "llama"})


def from_hf_model(model: nn.Module) -> MiniMindForCausalLM:
    """A Qwen3, Qwen3-MoE or Llama of transformers as our class; a model of our class as it is."""
    if isinstance(model, MiniMindForCausalLM):
        return model
    config, state = minimind_config(model.config), model.state_dict()
    config.tie_word_embeddings = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    ours = MiniMindForCausalLM(config)
    ours.load_state_dict(state)
    return ours


OUR_TEMPLATE = TOKENIZER_DIR / "chat_template.jinja"
GUARD, CUT = "\ufdd0", "\ufdd1"  # no characters of any text (Unicode's noncharacters)


def read_template(folder: str | Path) -> str:
    """The chat template of a tokenizer's folder; "" where it has none."""
    path, settings = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if path.is_file():
        return path.read_text("utf-8")
    try:
        template = json.loads(settings.read_text("utf-8")).get("chat_template") if settings.is_file() else ""
    except (ValueError, AttributeError) as error:
        raise UserError(f"{settings}: not JSON, or not of a tokenizer ({first_line(error)})") from None
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each["name"] == "default"), "")
    return template or ""


def open_tokenizer(folder: str | Path, own_template: bool = True) -> ChatTokenizer:
    """The tokenizer of a folder; with `own_template`, the folder's own chat template writes its prompts."""
    has_own = own_template and read_template(folder) not in ("", OUR_TEMPLATE.read_text("utf-8"))
    return TemplateTokenizer(folder) if has_own else ChatTokenizer(folder)


class TemplateTokenizer(ChatTokenizer):
    """A published tokenizer with the chat template of its folder, by which its models were trained.

    Only the three ChatML tokens must match ours; MiniMind2's tokenizer has no others, its `<think>` is text.
    """

    own_template = True
    required_tokens = {"<|endoftext|>": PAD, "<|im_start|>": BOS, "<|im_end|>": EOS}

    def __init__(self, folder: str | Path):
        from transformers import PreTrainedTokenizerFast

        super().__init__(folder)
        self.template = read_template(folder)
        added = json.loads((self.folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        self._added = {token["content"]: token["id"] for token in added}
        special = "|".join(re.escape(token["content"][1:]) for token in added if token["special"])
        self._special = re.compile(f"<(?={special})")
        self._renderer = PreTrainedTokenizerFast(
            tokenizer_file=str(self.folder / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>",
            pad_token="<|endoftext|>", unk_token="<|endoftext|>", chat_template=self.template)
        try:
            self._thinks = {thinking: self._render([{"role": "user", "content": "?"}], [], thinking).rstrip()
                            .endswith("<think>") for thinking in (False, True)}
        except ValueError as error:
            raise UserError(str(error)) from None

    def prompt(self, messages: list[dict], tools: list | str | None = None, open_thinking: bool = False,
               continue_final_message: bool = False) -> list[int]:
        """As `ChatTokenizer.prompt`, by the folder's template. No text becomes <|im_end|> or another special token."""
        render(messages, tools)  # refuses what ours does, and says in which message
        tools = parse_json(tools or messages[0].get("tools") or [], "tools", list)
        if tools and messages[0]["role"] == "system" and not messages[0].get("content"):  # only there to hold the tools
            messages = messages[1:] or messages
        if continue_final_message:
            check_continuable(messages[-1])
            final = messages[-1] | {"content": content_text(messages[-1].get("content")) + CUT}
            text = self._render([*messages[:-1], final], tools, open_thinking, add_generation_prompt=False)
            return self._encode(text.rpartition(CUT)[0])
        return self._encode(self._render(messages, tools, open_thinking))

    def observation(self, messages: list[dict], open_thinking: bool = False) -> list[int]:
        turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": CUT}]
        text = self._render([*turn, *messages], [], open_thinking)
        return self._encode(text.split(CUT)[1].removeprefix("<|im_end|>"))

    def starts_in_thinking(self, open_thinking: bool) -> bool:
        return self._thinks[open_thinking]

    def _render(self, messages: list[dict], tools: list, open_thinking: bool,
                add_generation_prompt: bool = True) -> str:
        """The text of a prompt. GUARD stands in what would be special tokens in the messages and tools."""
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        content = json.dumps([[template_message(message) for message in messages], tools], ensure_ascii=False)
        messages, tools = json.loads(self._special.sub(f"<{GUARD}", content))
        # without tokens to think in, a model was trained on prompts that say nothing about it
        thinking = {"enable_thinking": open_thinking} if open_thinking or self.has_special_tokens else {}
        try:
            return self._renderer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, **thinking, open_thinking=open_thinking,
                add_generation_prompt=add_generation_prompt)
        except Exception as error:  # whatever the template raises
            raise ValueError(f"the chat template of {self.folder}: {first_line(error)}") from None

    def _encode(self, text: str) -> list[int]:
        pieces = re.split("(" + "|".join(map(re.escape, self._added)) + ")", text)
        segments = [self._added.get(piece, piece.replace(GUARD, "")) for piece in pieces if piece]
        return self.encode_segments([[(segment, False) for segment in segments]])[0][0]


def template_message(message: dict) -> dict:
    """A message as templates expect it: its content text, its tool calls nested as OpenAI does."""
    plain = {"role": message["role"], "content": content_text(message.get("content"))}
    if message.get("reasoning_content") is not None:
        plain["reasoning_content"] = message["reasoning_content"]
    if calls := parse_tool_calls(message):
        plain["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return plain


def chat_template(tokenizer: ChatTokenizer) -> str:
    """The jinja template that renders as the tokenizer does."""
    return tokenizer.template if isinstance(tokenizer, TemplateTokenizer) else OUR_TEMPLATE.read_text("utf-8")


def save_folder(model: nn.Module, folder: str | Path, tokenizer: ChatTokenizer, kind: str = "CausalLM",
                dtype: torch.dtype = torch.float32, as_minimind: bool = False, **options) -> None:
    """Write `model` as a Qwen3 folder with its tokenizer, for transformers' AutoModelFor{kind}.

    With `as_minimind`, as MiniMind's class: its file goes along, for programs that load with trust_remote_code.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    if as_minimind:
        moe.register_expert_names()
        exported = MiniMindForCausalLM(MiniMindConfig(**model.config.to_dict() | {"auto_map": AUTO_MAP}))
    else:
        config = qwen3_config(model.config, **options)
        family = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}[config.model_type]
        exported = getattr(transformers, f"{family}For{kind}")(config)
    exported.load_state_dict(model.state_dict())
    exported.to(dtype).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # safetensors lets nobody else read them; the umask decides
        shutil.copymode(folder / "config.json", path)
    if as_minimind:
        for module in (model_minimind, attention, linear, moe):  # imported relatively, so transformers finds them
            shutil.copy(module.__file__, folder)
    else:  # transformers 5 renamed these; engines and transformers 4 read the old names, and have defaults for them
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config |= {"rope_theta": model.config.rope_theta, "torch_dtype": config["dtype"]}
        config |= {"num_experts": model.config.num_experts} if model.config.use_moe else {}
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = tokenizer.folder / name
        content = json.loads((source if source.is_file() else TOKENIZER_DIR / name).read_text("utf-8"))
        content.pop("chat_template", None)  # may be another one than below
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer), "utf-8")


def register() -> None:
    """Let transformers' AutoConfig and AutoModelForCausalLM open folders of MiniMind's class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)


def load_folder(folder: str | Path, flag: str = "--load_from") -> tuple[nn.Module, ChatTokenizer]:
    """A model and its tokenizer from a folder in transformers' format (Qwen3, or MiniMind's class); no remote code."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        hint = ", nor the word 'model'" if flag == "--load_from" else ""
        raise UserError(f"{flag} {folder}: not a transformers folder (no config.json){hint}")
    register()
    overrides = {}
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        if settings.get("model_type") == "minimind" and "n_routed_experts" in settings:  # MiniMind2's class
            overrides["config"] = MiniMindConfig(**settings | {
                "qk_norm": False, "num_experts": settings["n_routed_experts"],
                "n_shared_experts": settings["use_moe"] * settings["n_shared_experts"]})
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                                             trust_remote_code=False, **overrides)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{flag} {folder}: {first_line(error)}") from None
    if missing := sorted(loaded["missing_keys"]):  # transformers would leave them random, behind a warning
        raise UserError(f"{flag} {folder}: its weights lack {missing[0]} and {len(missing) - 1} others")
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{flag} {folder}: {broken[0]} holds NaN or infinite numbers; its weights are damaged")
    tokenizer = open_tokenizer(folder)
    rows = model.get_input_embeddings().num_embeddings
    if not 0 <= rows - tokenizer.vocab_size < MAX_PADDING:
        raise UserError(f"{flag} {folder}: its model embeds {rows:,} tokens, but its tokenizer has "
                        f"{tokenizer.vocab_size:,}")
    if rows > tokenizer.vocab_size:  # padding, which must not be sampled
        model.resize_token_embeddings(tokenizer.vocab_size)
    return model, tokenizer
