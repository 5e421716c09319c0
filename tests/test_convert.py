"""Weights in other programs: transformers, peft, llama.cpp and Go's templates get what convert_model writes."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import transformers
from lab import DEADLINE, ENVIRONMENT, ROOT, TOKENIZER, small_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.chat import ChatTokenizer
from model.cli import UserError, run_main
from model.model_lora import LoRAConfig, apply_lora, lora_state, save_lora
from model.model_minimind import MiniMindForCausalLM
from model.transformers_io import load_folder, qwen3_config, register, save_folder
from model.weights import load_weight, read_weight, save_weight, weights_hash
from scripts import convert_model
from scripts.lib import gguf_file

MODELS = {"dense": {}, "moe": {"use_moe": True}, "moe-top2": {"use_moe": True, "num_experts_per_tok": 2},
          "moe-published": {"use_moe": 1, "norm_topk_prob": 1}}  # as flags give them
kinds = pytest.mark.parametrize("kind", MODELS)
NODE = Path(os.environ.get("MINIMIND_NODE", Path.home() / ".cache/minimind/node"))
CALL = {"name": "get_weather", "arguments": {"city": "北京", "days": 2}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CHATS = [
    ([{"role": "user", "content": "你好"}], None),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2?"}], None),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
      {"role": "assistant", "content": "Hello 🙂", "reasoning_content": "A greeting."},
      {"role": "user", "content": "天气"}], TOOLS),
    ([{"role": "user", "content": "天气?"}, {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
      {"role": "tool", "content": '{"t": 20}'}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
      {"role": "tool", "content": "22"}], TOOLS),
]


def filled(**options) -> MiniMindForCausalLM:
    """A small model whose weights say something, to the precision of a .pth."""
    model = small_model(**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model.half().float().eval()


def convert(source: Path, target: Path, form: str, *flags: object) -> None:
    arguments = ("--source", source, "--target", target, "--format", form, *flags)
    with mock.patch.object(sys, "argv", ["convert_model.py", *map(str, arguments)]):
        run_main(convert_model.main)


def refused(capsys, status: int, words: str, *arguments: object) -> None:
    """The conversion ends with `status` and one line that says `words`, and leaves nothing behind."""
    before = sorted(arguments[1].parent.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        convert(*arguments)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == status and len(said) == 1 and words in said[0], said
    assert sorted(arguments[1].parent.rglob("*")) == before


@pytest.fixture
def source(tmp_path):
    return lambda kind, **options: save_weight(filled(**MODELS[kind], **options), "full_sft", tmp_path, TOKENIZER)


def some_ids() -> torch.Tensor:
    return torch.tensor([TOKENIZER.encode(CHATS[2][0])[0]])


@pytest.mark.parametrize("form", ["transformers", "minimind"])
@kinds
def test_a_folder_says_and_renders_the_same(tmp_path, source, kind, form, capsys):
    path = source(kind)
    convert(path, tmp_path / "folder", form)
    assert "within" in capsys.readouterr().out
    register()
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32,
                                                        output_loading_info=True)
    names = {"minimind": "MiniMind", "transformers": "Qwen3" if kind == "dense" else "Qwen3Moe"}
    assert type(theirs).__name__ == f"{names[form]}ForCausalLM" and not any(info.values())
    assert_close(theirs(some_ids()).logits, read_weight(path)[0].eval()(some_ids()).logits, rtol=0, atol=1e-5)
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "folder/model.safetensors").values())
    assert {path.stat().st_mode for path in (tmp_path / "folder").iterdir()} == {path.stat().st_mode}  # by the umask
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for messages, tools in CHATS:
        written = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True,
                                                return_assistant_tokens_mask=True)
        assert (written["input_ids"], written["assistant_masks"]) == TOKENIZER.encode(messages, tools)


REMOTE_CODE = """
import importlib.util, sys, torch, transformers
assert not any(map(importlib.util.find_spec, ("model", "trainer", "dataset"))), "this repository can be imported"
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)
ids = torch.tensor([[5, 6, 7, 8]])
answer = model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None)
torch.save((model(ids).logits.detach(), answer), sys.argv[2])
"""


def test_a_folder_of_our_class_opens_as_remote_code(tmp_path, source):
    """From an empty directory, in a fresh process that finds nothing of this repository."""
    path, empty = source("moe"), tmp_path / "empty"
    empty.mkdir()
    convert(path, tmp_path / "folder", "minimind")
    command = [sys.executable, "-I", "-c", REMOTE_CODE, str(tmp_path / "folder"), str(tmp_path / "results")]
    subprocess.run(command, check=True, cwd=empty, env=ENVIRONMENT | {"HF_HOME": str(tmp_path)}, timeout=DEADLINE)
    logits, answer = torch.load(tmp_path / "results")
    ours, ids = read_weight(path)[0].eval(), torch.tensor([[5, 6, 7, 8]])
    assert_close(logits, ours(ids).logits, rtol=0, atol=1e-5)
    assert answer.tolist() == ours.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None).tolist()


@kinds
def test_a_pth_comes_back_to_the_bit(tmp_path, source, kind):
    path = source(kind)
    convert(path, tmp_path / "folder", "transformers")
    back = tmp_path / path.name.replace("full_sft", "back")
    convert(tmp_path / "folder", back, "torch")
    assert_close(torch.load(back), torch.load(path), rtol=0, atol=0)
    cards = [json.loads(p.with_suffix(".json").read_text())["config"] for p in (path, back)]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("kind", ["dense", "moe-published"])
def test_a_model_of_transformers_becomes_ours(tmp_path, kind):
    """Their class, their initialisation, their file; head and embedding apart; no .json of ours."""
    sizes = {"tie_word_embeddings": False, "intermediate_size": 192, "rope_theta": 5e5, "head_dim": 16}
    config = qwen3_config(small_model(**MODELS[kind]).config, **sizes)
    config.rope_parameters["rope_theta"] = 5e5
    theirs = (transformers.Qwen3ForCausalLM if kind == "dense" else transformers.Qwen3MoeForCausalLM)(config).eval()
    for value in theirs.parameters():
        value.data = value.half().float()
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER.folder / name, tmp_path / "theirs" / name)
    target = tmp_path / f"theirs_64{'_moe' * (kind != 'dense')}.pth"
    convert(tmp_path / "theirs", target, "torch")
    ours = load_weight("theirs", tmp_path, tokenizer=TOKENIZER)[0].eval()
    assert_close(ours(some_ids()).logits, theirs(some_ids()).logits, rtol=0, atol=1e-5)


def test_a_published_state_dict_without_a_card_is_read(tmp_path):
    model = filled(use_moe=True, norm_topk_prob=True)
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            for number, pair in enumerate(value):
                for part, half in zip(("gate_proj", "up_proj"), pair.chunk(2), strict=True):
                    state[name.replace("gate_up_proj", f"{number}.{part}.weight")] = half.clone()
        elif name.endswith("experts.down_proj"):
            state |= {name.replace("down_proj", f"{i}.down_proj.weight"): v.clone() for i, v in enumerate(value)}
        else:
            state[name] = value
    torch.save(state, tmp_path / "published.pth")
    convert(tmp_path / "published.pth", tmp_path / "folder", "transformers", "--tokenizer", "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert_close(theirs(some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", ["per expert", "stacked"])
def test_both_layouts_of_experts_are_read_and_a_gap_is_refused(tmp_path, names, capsys):
    model = filled(use_moe=True)
    save_folder(model, tmp_path / "folder", TOKENIZER, as_minimind=True)
    file = tmp_path / "folder/model.safetensors"
    state = load_file(file)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in state
    if names == "stacked":
        state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(state, file, {"format": "pt"})
    assert_close(load_folder(tmp_path / "folder")[0](some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-5)
    state = {name: value for name, value in state.items() if "layers.1.mlp.experts" not in name}
    save_file(state, file, {"format": "pt"})
    refused(capsys, 2, "its weights lack model.layers.1.mlp.experts.down_proj and 1 others", tmp_path / "folder",
            tmp_path / "again_64_moe.pth", "torch")


@kinds
def test_a_lora_is_merged_into_any_format(tmp_path, source, kind):
    path = source(kind)
    base = read_weight(path)[0].eval()
    lora = LoRAConfig(rank=4, targets=("q_proj", "down_proj"), base=weights_hash(base))
    adapted = read_weight(path)[0].eval()
    apply_lora(adapted, lora)
    for value in lora_state(adapted).values():
        value.data = torch.randn_like(value).mul(0.1).half().float()
    adapter = save_lora(adapted, "lora", tmp_path, TOKENIZER, lora)
    convert(path, tmp_path / "merged", "transformers", "--lora", adapter, "--dtype", "f32")
    convert(adapter, tmp_path / "peft", "peft")
    assert {file.stat().st_mode for file in (tmp_path / "peft").iterdir()} == {path.stat().st_mode}
    convert(path, tmp_path / "merged_too", "transformers", "--lora", f"{tmp_path / 'peft'}=1.0", "--dtype", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    too = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_too", dtype=torch.float32)
    qwen3 = transformers.Qwen3ForCausalLM if kind == "dense" else transformers.Qwen3MoeForCausalLM
    referee = qwen3(qwen3_config(base.config)).eval()
    referee.load_state_dict(base.state_dict())
    referee = peft.PeftModel.from_pretrained(referee, tmp_path / "peft")
    expected = referee(some_ids()).logits
    assert (expected - base(some_ids()).logits).abs().max() > 0.1
    for model in (theirs, too):
        assert_close(model(some_ids()).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["torch", "gguf"])
def test_rows_of_the_embedding_that_no_token_has_are_cut(tmp_path, form):
    model, target = filled(vocab_size=TOKENIZER.vocab_size + 64), tmp_path / "cut_64.pth"
    save_folder(model, tmp_path / "folder", TOKENIZER)
    convert(tmp_path / "folder", target, form)
    weight = read_weight(target, TOKENIZER)[0] if form == "torch" else gguf_file.read_gguf(target, small_model().config)
    expected = model(some_ids()).logits[..., :TOKENIZER.vocab_size]
    assert_close(weight.eval()(some_ids()).logits, expected, rtol=0, atol=1e-5)


def test_a_conversion_that_went_wrong_leaves_nothing(tmp_path, source, monkeypatch, capsys):
    path, save = source("dense"), convert_model.save_folder

    def careless(model, *arguments, **options):
        model = read_weight(path)[0]
        model.model.layers[1].self_attn.k_proj.weight.data[3] += 1
        save(model, *arguments, **options)

    monkeypatch.setattr(convert_model, "save_folder", careless)
    refused(capsys, 1, "was not written", path, tmp_path / "folder", "transformers")


def test_mistakes_are_told_in_one_line(tmp_path, source, capsys):
    path = source("dense")
    refused(capsys, 2, "no such file", tmp_path / "absent.pth", tmp_path / "x", "gguf")
    refused(capsys, 2, "already there", path, tmp_path, "transformers")
    refused(capsys, 2, "already there", path, path, "torch")
    with pytest.raises(UserError, match="already there"):
        convert_model.parse_args(["--format", "gguf", "--target", "/"])
    (tmp_path / "mine.Modelfile").touch()
    refused(capsys, 2, "mine.Modelfile is already there", path, tmp_path / "mine.gguf", "gguf")
    refused(capsys, 2, "called NAME_64.pth", path, tmp_path / "x_32.pth", "torch")
    refused(capsys, 2, "is of --format gguf", path, tmp_path / "x", "transformers", "--dtype", "q8_0")
    refused(capsys, 2, "holds f16", path, tmp_path / "x_64.pth", "torch", "--dtype", "bf16")
    refused(capsys, 2, "write PATH or PATH=WEIGHT", path, tmp_path / "x", "gguf", "--lora", "a=b")
    refused(capsys, 2, "not a LoRA file", path, tmp_path / "x", "gguf", "--lora", path)
    refused(capsys, 2, "--source", tmp_path, tmp_path / "x", "gguf")
    (tmp_path / "broken").mkdir()
    for content in ("{", "[]", '{"model_type": "minimind", "n_routed_experts": 4}'):
        (tmp_path / "broken/config.json").write_text(content)
        refused(capsys, 2, "--source", tmp_path / "broken", tmp_path / "x", "gguf")
    model = filled()
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e6
    save_folder(model, tmp_path / "large", TOKENIZER)
    refused(capsys, 2, "f16 cannot hold these weights", tmp_path / "large", tmp_path / "x", "gguf")
    convert(tmp_path / "large", tmp_path / "bf16.gguf", "gguf", "--dtype", "bf16")
    for change, words in (({"attention_bias": True}, "lack model.layers.0.self_attn"), ({"hidden_act": "gelu"}, "gelu"),
                          ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                                                "original_max_position_embeddings": 2048}}, "yarn")):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        save_folder(filled(), tmp_path / "other", TOKENIZER)
        config = json.loads((tmp_path / "other/config.json").read_text())
        (tmp_path / "other/config.json").write_text(json.dumps(config | change))
        refused(capsys, 2, words, tmp_path / "other", tmp_path / "other_64.pth", "torch")


# What the Qwen3 loaders of vLLM and SGLang read (qwen3.py, qwen3_moe.py, qwen2.py of both): keys of config.json
READ = {"architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_parameters", "rms_norm_eps",
        "attention_bias", "hidden_act", "intermediate_size", "tie_word_embeddings", "pad_token_id", "torch_dtype"}
READ_MOE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
            "mlp_only_layers"}


@kinds
def test_vllm_and_sglang_find_what_they_read(tmp_path, kind):
    """Names as they stand in the checkpoint; both stack q, k, v and gate, up themselves, and want experts apart."""
    save_folder(filled(**MODELS[kind]), tmp_path, TOKENIZER, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    layer = {"input_layernorm", "post_attention_layernorm",
             *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))}
    network = ("gate_proj", "up_proj", "down_proj")
    if kind == "dense":
        layer |= {f"mlp.{name}" for name in network}
        assert config["architectures"] == ["Qwen3ForCausalLM"] and not any("expert" in key for key in config)
    else:
        layer |= {"mlp.gate", *(f"mlp.experts.{number}.{name}" for number in range(4) for name in network)}
        assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config.keys() > READ_MOE
        assert (config["norm_topk_prob"], config["num_experts"]) == (kind == "moe-published", 4)
    names = {"model.embed_tokens", "model.norm", *(f"model.layers.{i}.{name}" for i in range(2) for name in layer)}
    if kind != "dense":  # SGLang's Qwen3-MoE has a head of its own, tied or not
        names |= {"lm_head"}
    assert load_file(tmp_path / "model.safetensors").keys() == {f"{name}.weight" for name in names}
    assert config.keys() > READ and config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["tie_word_embeddings"] == (kind == "dense") and config["torch_dtype"] == "bfloat16"


def ask_node(**request) -> dict:
    if not (NODE / "node_modules").is_dir() or not shutil.which("node"):
        pytest.skip(f"no node, or no node-llama-cpp in {NODE}; .ci/run installs it, MINIMIND_NODE names another folder")
    done = subprocess.run(["node", str(ROOT / "tests/referees.mjs")], input=json.dumps(request), text=True,
                          encoding="utf-8", capture_output=True, timeout=DEADLINE,
                          env=os.environ | {"MINIMIND_NODE": str(NODE)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def strings() -> list[str]:
    """200 of them: Chinese, English, code, emoji, digits, spaces, and characters of any kind."""
    dice = random.Random(0)
    lines = [line for name in ("README.md", "README_zh.md", "model/chat.py", "model/chat_template.jinja")
             for line in (ROOT / name).read_text("utf-8").splitlines() if line.strip() and "<" not in line]
    emoji = ["🙂", "👩‍👩‍👧", "🇨🇳", "👍🏽", "❤️", "🏴‍☠️", "1️⃣"]
    drawn, dice = dice.sample(lines, 100), random.Random(0)  # anew: the others do not depend on those files
    drawn += ["".join(dice.choices(emoji + list("ab 12你。"), k=8)) for _ in range(30)]
    drawn += ["".join(dice.choices(" \t\n\r\u00a0\u3000aB'9,。", k=12)) for _ in range(40)]
    # without surrogates, which are not text, NUL, which ends a string in C, and what some versions of Unicode lack
    ranges = [[chr(i) for i in points if unicodedata.category(chr(i)) != "Cn"]
              for points in (range(1, 0x800), range(0x800, 0xD800), range(0xE000, 0x1F9FF))]
    while len(drawn) < 200:
        drawn.append("".join(dice.choice(points) for points in dice.choices(ranges, k=8)))
    return drawn


def greedy(model, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == 2:
                break
    return ids[len(prompt):]


def largest_difference(model, prompts: list[list[int]], probabilities: list[dict]) -> float:
    """Between our next-token probabilities and the largest of llama.cpp's."""
    with torch.no_grad():
        ours = [model(torch.tensor([prompt])).logits[0, -1].softmax(-1) for prompt in prompts]
    return max(abs(p[int(token)].item() - q) for p, theirs in zip(ours, probabilities, strict=True)
               for token, q in theirs.items())


def test_llama_cpp_says_the_same(tmp_path, source):
    texts, prompts = strings(), [TOKENIZER.prompt(messages, tools) for messages, tools in CHATS]
    markers = "".join(f"{marker}a" for marker in AutoTokenizer.from_pretrained(ROOT / "model").get_added_vocab())
    models, requests = {}, []
    for kind in MODELS:
        path, gguf = source(kind), tmp_path / f"{kind}.gguf"
        convert(path, gguf, "gguf", "--dtype", "f32")
        models[kind] = read_weight(path)[0].eval()
        requests.append({"path": str(gguf), "texts": [], "prompts": prompts, "length": 24})
    requests[0]["texts"] = [*texts, markers]
    chats = [{"messages": messages, "tools": tools, "add_generation_prompt": True} for messages, tools in CHATS]
    answers = ask_node(models=requests, chats=chats)["models"]
    for said, (kind, model) in zip(answers, models.items(), strict=True):
        assert said["architecture"] == {"dense": "qwen3", "moe-published": "qwen3moe"}.get(kind, "bailingmoe2")
        assert largest_difference(model, prompts, said["probabilities"]) < 1e-4, kind
        assert said["continued"] == [greedy(model, prompt, 24) for prompt in prompts], kind
    said = answers[0]
    jinja = AutoTokenizer.from_pretrained(ROOT / "model")
    assert said["rendered"] == [jinja.apply_chat_template(messages, tools=tools, tokenize=False,
                                                          add_generation_prompt=True) for messages, tools in CHATS]
    assert said["end"] and said["template"] == (ROOT / "model/chat_template.jinja").read_text("utf-8")
    assert said["plain"][:-1] == said["marked"][:-1] == TOKENIZER.encode_texts(texts) and len(texts) == 200
    assert said["marked"][-1] == AutoTokenizer.from_pretrained(ROOT / "model")(markers)["input_ids"]
    assert "<think>a</think>" in said["shown"][-1] and "<tool_call>a" in said["shown"][-1]
    assert "<|im_end|>" not in said["shown"][-1]  # not of the text, as the others are


def test_llama_cpp_reads_every_dtype(tmp_path, source):
    """Against our model with the rounded weights; llama.cpp rounds what goes into them, too."""
    path, prompts, models, requests = source("dense"), [TOKENIZER.prompt(*chat) for chat in CHATS[:2]], [], []
    for dtype in ("f16", "bf16", "q8_0", "q4_0"):
        gguf = tmp_path / f"{dtype}.gguf"
        convert(path, gguf, "gguf", "--dtype", dtype)
        models.append(gguf_file.read_gguf(gguf, read_weight(path)[0].config).eval())
        requests.append({"path": str(gguf), "texts": [], "prompts": prompts, "length": 1})
    answers = ask_node(models=requests)["models"]
    for model, said, most in zip(models, answers, (0.002, 0.01, 0.02, 0.02), strict=True):
        assert largest_difference(model, prompts, said["probabilities"]) < most


def test_a_tokenizer_that_splits_as_gpt2_does_is_known_and_others_are_refused(tmp_path, capsys):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ours = json.loads((ROOT / "model/tokenizer.json").read_text("utf-8"))
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False, special_tokens=[t["content"] for t in ours["added_tokens"]])
    tokenizer.train_from_iterator(strings(), trainer)
    (tmp_path / "gpt2").mkdir()
    tokenizer.save(str(tmp_path / "gpt2/tokenizer.json"))
    theirs = ChatTokenizer(tmp_path / "gpt2")
    path = save_weight(filled(vocab_size=800), "full_sft", tmp_path, theirs)
    convert(path, tmp_path / "model.gguf", "gguf", "--tokenizer", tmp_path / "gpt2")
    request = {"path": str(tmp_path / "model.gguf"), "texts": strings(), "prompts": [], "length": 0}
    said, = ask_node(models=[request])["models"]
    assert said["plain"] == theirs.encode_texts(strings())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    tokenizer.save(str(tmp_path / "gpt2/tokenizer.json"))
    path = save_weight(filled(vocab_size=800), "full_sft", tmp_path, ChatTokenizer(tmp_path / "gpt2"))
    refused(capsys, 2, "no name for the way", path, tmp_path / "x.gguf", "gguf", "--tokenizer", tmp_path / "gpt2")


def test_ollama_renders_as_our_template_does(tmp_path, source):
    convert(source("dense"), tmp_path / "model.gguf", "gguf")
    text = (tmp_path / "model.Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./model.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    assert "\nPARAMETER num_ctx 8192\n" in text and "\n# SYSTEM " in text
    values, expected, jinja = [], [], AutoTokenizer.from_pretrained(ROOT / "model")
    for (messages, tools), thinking in itertools.product(CHATS, (False, True)):
        expected.append(jinja.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True,
                                                  open_thinking=thinking))
        turns = [{"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content", ""),
                  "ToolCalls": [{"Function": {"Name": call["name"], "Arguments": json.dumps(
                      call["arguments"], ensure_ascii=False)}} for call in m.get("tool_calls", [])]} for m in messages]
        values.append({"System": "".join(m["content"] for m in messages if m["role"] == "system"), "Messages": turns,
                       "Think": thinking, "Tools": [json.dumps(tool) for tool in tools or []]})
    assert ask_node(template=text.split('"""')[1], values=values)["rendered"] == expected


def test_without_arguments_the_published_conversion_is_done(tmp_path, capsys, monkeypatch):
    save_weight(small_model(hidden_size=768, num_hidden_layers=1), "full_sft", tmp_path / "out", TOKENIZER)
    monkeypatch.setattr(convert_model, "OUT_DIR", tmp_path / "out")
    monkeypatch.setattr(convert_model, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["convert_model.py"])
    run_main(convert_model.main)
    assert (tmp_path / "minimind-3/config.json").is_file() and "full_sft_768.pth" in capsys.readouterr().out
    with pytest.raises(UserError, match="--target"):
        convert_model.parse_args(["--format", "gguf"])
