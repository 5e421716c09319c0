"""Prompts → trajectories, sampled from the policy: by the engine in this process, or by a server over HTTP.

Sampling is at one temperature from the whole distribution, because that is the policy whose gradient is taken: top-p,
top-k or penalties would make it another one. A trajectory holds the very ids that were sampled; nothing is tokenised
again.
"""

import argparse
import http.client
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dataset.prompts import Prompt
from model.chat import AssistantMessage, ChatTokenizer, parse_message
from model.cli import Failure, UserError, first_line
from model.inference.engine import Engine, Sampling
from model.transformers_io import save_folder
from model.weights import weights_hash
from trainer.distributed import World

FULL_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is near: no proxy


@dataclass
class Trajectory:
    """What followed a prompt: sampled ids and, in an episode with tools, the ids of what was observed between."""

    prompt: Prompt
    completion_ids: list[int] = field(default_factory=list)  # after the prompt
    action_mask: list[bool] = field(default_factory=list)  # of each of them: drawn from the policy, so to be trained
    logprobs: list[float] = field(default_factory=list)  # nats, as each was drawn; 0 where nothing was
    finish_reason: str = ""  # "stop", "length", or in an episode "turns": there were no more to take
    answer: AssistantMessage = field(default_factory=AssistantMessage)  # the last turn, taken apart
    turns: list[AssistantMessage] = field(default_factory=list)  # of an episode, all of them
    calls: list[tuple[dict, dict]] = field(default_factory=list)  # of an episode: {"name", "arguments"} and its result

    @property
    def tokens(self) -> list[int]:
        return self.prompt.ids + self.completion_ids

    @property
    def truncated(self) -> bool:
        return self.finish_reason != "stop"


class LocalRolloutEngine:
    """The engine of this process on the policy's own weights: no copy, so nothing can lag behind.

    `autocast`: the context in which the policy is trained; sampling in another precision would be another policy.
    """

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer, autocast: AbstractContextManager | None = None,
                 max_batch: int = 64):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.autocast = autocast or nullcontext()

    def update(self) -> None:
        """The weights have changed. Here they are the policy's own."""

    @contextmanager
    def open(self, requests: int) -> Iterator[Engine]:
        """The engine for up to so many requests at once, on the weights as they are now."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                yield Engine(self.model, max_batch=max(1, min(self.max_batch, requests)))
        finally:
            self.model.train(training)

    def generate(self, prompts: list[Prompt], sampling: list[Sampling]) -> list[Trajectory]:
        """One answer to each prompt, in the same order."""
        with self.open(len(prompts)) as engine:
            sequences = [engine.add(prompt.ids, how) for prompt, how in zip(prompts, sampling, strict=True)]
            while engine.busy:
                engine.step()
        return [trajectory_of(self.tokenizer, prompt, s.ids, s.logprobs, s.finish_reason)
                for prompt, s in zip(prompts, sequences, strict=True)]


class RemoteRolloutEngine:
    """A server that samples for all ranks; `update` gives it the weights, in a new folder of `folder`, which it reads.

    What it serves has a name, made of the weights' own hash: an answer from other weights than the policy's is
    a Failure, like a server that cannot be reached or refuses. Ids go out and come back: nothing is tokenised there.
    Each kind of server has its `_refresh`, which loads a folder, and its `_sample`, which asks for one answer.
    """

    def __init__(self, url: str, folder: Path, model: nn.Module, tokenizer: ChatTokenizer, world: World,
                 max_batch: int = 256, timeout: float = 1800):
        self.url, self.folder, self.model, self.tokenizer, self.world = url, folder, model, tokenizer, world
        self.max_batch, self.timeout = max_batch, timeout  # requests at a time, and seconds that one may take
        self.version, self.updates, self.written, self.temperature_checked = "", 0, None, False

    def update(self) -> None:
        """The weights have changed: write them, let the server load them. Every rank calls this, the first one acts."""
        self.updates += 1
        self.version, error = f"{self.updates}-{weights_hash(self.model)}", None
        if self.world.main:
            old, self.written = self.written, self.folder / self.version  # no cache can take one for the other
            half = self.folder / f".{self.version}.tmp"
            try:
                save_folder(self.model, half, self.tokenizer)
                shutil.rmtree(self.written, ignore_errors=True)  # an earlier run's
                half.rename(self.written)
                self._refresh(str(self.written))
                if old:
                    shutil.rmtree(old, ignore_errors=True)
            except (Failure, OSError) as failed:
                error = f"rollouts: {first_line(failed)}"
        for failed in filter(None, self.world.gather(error)):
            raise Failure(failed)

    def generate(self, prompts: list[Prompt], sampling: list[Sampling]) -> list[Trajectory]:
        """One answer to each prompt, in the same order."""
        self._check_version(f"{self.updates}-{weights_hash(self.model)}", "the policy is at")
        if prompts and not self.temperature_checked and any(how.temperature not in (0, 1) for how in sampling):
            self._check_temperature(prompts[0].ids)
        with ThreadPoolExecutor(self.max_batch) as pool:
            answers = pool.map(self._ask, [prompt.ids for prompt in prompts], sampling)
            return [trajectory_of(self.tokenizer, prompt, *answer[:3])
                    for prompt, answer in zip(prompts, answers, strict=True)]

    def _ask(self, ids: list[int], sampling: Sampling) -> tuple[list[int], list[float], str, list[float]]:
        """Sampled ids, their log-probabilities, why they end, and the likeliest log-probability of each step."""
        try:
            answer, logprobs, reason, likeliest = self._sample(ids, sampling)
            whole = 0 < len(answer) == len(logprobs) and None not in logprobs
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Failure(f"{self.url}: an unreadable answer ({type(error).__name__}: {error}); is the server of "
                          "that kind, and recent?") from None
        if not whole or reason not in ("stop", "length") or (reason == "stop") != (answer[-1] in sampling.stop_ids):
            raise Failure(f"{self.url}: a broken answer: {len(answer)} ids, {len(logprobs)} log-probabilities, ended "
                          f"by {reason!r} at id {answer[-1] if answer else None}")
        return answer, logprobs, reason, likeliest

    def _check_version(self, served: str, who: str = "it serves") -> None:
        if served != self.version:
            raise Failure(f"{self.url}: {who} weights {served!r}, and {self.version!r} are the last it was given")

    def _check_temperature(self, ids: list[int]) -> None:
        """Fail if log-probabilities are not those of the sampled distribution: these change with the temperature."""
        cold, hot = (self._ask(ids, Sampling(1, temperature, top_logprobs=1))[3][0] for temperature in (1, 2))
        if cold < -0.05:  # else there is nothing to choose here, at any temperature: the next rollout may show it
            if hot > cold - 0.01:
                raise Failure(f"{self.url}: its log-probabilities are those before the temperature; {self.hint}")
            self.temperature_checked = True

    def _call(self, path: str, body: dict | None = None) -> dict:
        """POST `body` as JSON, or GET. Raises Failure for anything but success."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"},
                                         method="GET" if body is None else "POST")
        try:
            with OPENER.open(request, None, self.timeout) as reply:
                text = reply.read()
            return json.loads(text or "{}")
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode("utf-8", "replace").split())
            raise Failure(f"{self.url}{path} answers {error.code}: {said or error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"{self.url}: no answer from the server: {first_line(error)}") from None
        except ValueError:
            raise Failure(f"{self.url}{path} does not answer in JSON") from None


class SGLangEngine(RemoteRolloutEngine):
    """SGLang's native API (docs.sglang.io: "SGLang for RL Systems", "Native APIs").

    It reports log-probabilities after the temperature unless it was started with SGLANG_RETURN_ORIGINAL_LOGPROB, and
    obeys seeds with --enable-deterministic-inference only. Written after SGLang 0.5.23.
    """

    hint = "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"

    def _refresh(self, folder: str) -> None:
        reply = self._call("/update_weights_from_disk", {
            "model_path": folder, "weight_version": self.version, "flush_cache": True})
        if reply.get("success") is not True:
            raise Failure(f"{self.url}: weights not updated: {reply.get('message')}")

    def _sample(self, ids: list[int], sampling: Sampling) -> tuple[list[int], list[float], str, list[float]]:
        how = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "sampling_seed":
               sampling.seed, "stop_token_ids": list(sampling.stop_ids), "no_stop_trim": True, **FULL_DISTRIBUTION}
        meta = self._call("/generate", {"input_ids": ids, "sampling_params": how, "return_logprob": True,
                                        "top_logprobs_num": sampling.top_logprobs or 0})["meta_info"]
        self._check_version(meta["weight_version"])
        sampled = meta["output_token_logprobs"]  # (log-probability, id, text), the stop token's too
        likeliest = [step[0][0] for step in meta["output_top_logprobs"]] if sampling.top_logprobs else []
        return [each[1] for each in sampled], [each[0] for each in sampled], meta["finish_reason"]["type"], likeliest


class VLLMEngine(RemoteRolloutEngine):
    """vLLM's completions, and its calls for development (docs.vllm.ai: "Layerwise (Re)loading", "Weight Transfer").

    To be started with VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs. Written after vLLM 0.33.
    """

    hint = "start it with --logprobs-mode processed_logprobs"

    def _refresh(self, folder: str) -> None:
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        if self._call("/reset_prefix_cache?reset_running_requests=true", {}).get("success") is False:
            raise Failure(f"{self.url}: it keeps keys and values of the old weights")
        self._call("/update_weight_version", {"new_version": self.version})  # a label: after what it stands for

    def generate(self, prompts: list[Prompt], sampling: list[Sampling]) -> list[Trajectory]:
        """One answer to each prompt, in the same order; the version is asked for before and after, answers lack it."""
        self._check_version(self._call("/weight_info").get("weight_version"))
        trajectories = super().generate(prompts, sampling)
        self._check_version(self._call("/weight_info").get("weight_version"))
        return trajectories

    def _sample(self, ids: list[int], sampling: Sampling) -> tuple[list[int], list[float], str, list[float]]:
        choice = self._call("/v1/completions", {
            "prompt": ids, "max_tokens": sampling.max_new_tokens, "seed": sampling.seed,
            "temperature": sampling.temperature, "stop_token_ids": list(sampling.stop_ids), "logprobs": 1,
            "return_token_ids": True, **FULL_DISTRIBUTION})["choices"][0]
        noted = choice["logprobs"]
        likeliest = [max(step.values()) for step in noted["top_logprobs"]] if sampling.top_logprobs else []
        return choice["token_ids"], noted["token_logprobs"], choice["finish_reason"], likeliest


def trajectory_of(tokenizer: ChatTokenizer, prompt: Prompt, ids: list[int], logprobs: list[float],
                  finish_reason: str) -> Trajectory:
    """An answer that was sampled in one go."""
    return Trajectory(prompt, ids, [True] * len(ids), logprobs, finish_reason,
                      parse_message(tokenizer, ids, prompt.thinking))


def policy_sampling_params(max_new_tokens: int, temperature: float, seed: int) -> Sampling:
    """How a policy is sampled for its gradient: nothing cut off, nothing penalised."""
    return Sampling(max_new_tokens, temperature, top_p=1.0, top_k=0, min_p=0.0, seed=seed)


def add_rollout_engine_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who samples")
    group.add_argument("--rollout_engine", choices=("local", "sglang", "vllm"), default="local",
                       help="local: this process, from the policy itself")
    group.add_argument("--rollout_url", help="of the SGLang or vLLM server, like http://127.0.0.1:30000")
    group.add_argument("--rollout_dir", help="folder it reads new weights from (default: {save_dir}/rollout_weights)")


def make_rollout_engine(args: argparse.Namespace, model: nn.Module, tokenizer: ChatTokenizer,
                        autocast: AbstractContextManager, world: World) -> LocalRolloutEngine | RemoteRolloutEngine:
    """What --rollout_engine names. Raises UserError when it has no usable --rollout_url."""
    if args.rollout_engine == "local":
        return LocalRolloutEngine(model, tokenizer, autocast)
    if not (args.rollout_url or "").startswith(("http://", "https://")):
        raise UserError(f"--rollout_engine {args.rollout_engine} needs the server's --rollout_url http://HOST:PORT")
    folder = Path(args.rollout_dir or args.save_dir / "rollout_weights").expanduser().absolute()
    kind = SGLangEngine if args.rollout_engine == "sglang" else VLLMEngine
    return kind(args.rollout_url.rstrip("/"), folder, model, tokenizer, world)
