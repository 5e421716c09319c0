"""Rollout engines over HTTP: an SGLang or vLLM server samples, after loading the policy's weights from a folder."""

import atexit
import http.client
import json
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dataset.prompts import Prompt
from model.chat import ChatTokenizer
from model.cli import Failure, first_line
from model.inference.engine import SamplingParams
from model.model_minimind import MiniMindForCausalLM
from model.transformers_io import save_folder
from model.weights import weights_hash
from trainer.distributed import World
from trainer.losses import token_log_probs
from trainer.rl.trajectory import Trajectory

# Nothing is cut off or penalised: the policy whose gradient is taken is the whole distribution.
FULL_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on the same network: no proxy


class Completion(NamedTuple):
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    max_logprobs: list[float]  # of the likeliest token at each step, where top_logprobs was asked for


class RemoteRolloutEngine:
    """A server that samples for all ranks. Ids go out and come back: nothing is tokenised there.

    `update` writes the weights to a new folder under `folder` and has the server load it under a version name that
    contains their hash. Completions from any other weights than the policy's are a Failure, as is a server that cannot
    be reached or refuses. A subclass knows how its server loads a folder (`_load_weights`) and samples (`_complete`).
    """

    temperature_hint: str  # how to start a server that reports log-probabilities before the temperature

    def __init__(self, url: str, folder: Path, model: nn.Module, tokenizer: ChatTokenizer, world: World,
                 max_batch: int = 256, timeout: float = 1800):
        self.url, self.folder, self.model, self.tokenizer, self.world = url, folder, model, tokenizer, world
        self.max_batch, self.timeout = max_batch, timeout  # requests at a time, and seconds that one may take
        self.version, self.updates, self.temperature_checked = "", 0, False
        self.served_folder: Path | None = None
        atexit.register(self._remove_served_folder)  # which the server has read

    def update(self) -> None:
        """Have the server load the weights as they are now. Every rank calls this; the first one acts."""
        self.updates += 1
        self.version, error = self._policy_version(), None
        if self.world.main:
            try:
                self._publish()
            except (Failure, OSError) as failure:
                error = f"rollouts: {first_line(failure)}"
        for failure in filter(None, self.world.gather(error)):
            raise Failure(failure)

    def generate(self, prompts: list[Prompt], sampling_params: list[SamplingParams]) -> list[Trajectory]:
        """One answer to each prompt, in the same order."""
        self._check_version(self._policy_version(), "the policy is at")
        if prompts and not self.temperature_checked and any(s.temperature not in (0, 1) for s in sampling_params):
            self._check_temperature(prompts[0].ids)
        with ThreadPoolExecutor(self.max_batch) as pool:
            completions = pool.map(self._complete_checked, [prompt.ids for prompt in prompts], sampling_params)
            return [Trajectory.from_completion(self.tokenizer, prompt, c.ids, c.logprobs, c.finish_reason)
                    for prompt, c in zip(prompts, completions, strict=True)]

    def _policy_version(self) -> str:
        return f"{self.updates}-{weights_hash(self.model)}"

    def _publish(self) -> None:
        """Write the weights, let the server load them, delete the folder it served before."""
        previous, self.served_folder = self.served_folder, self.folder / self.version  # a name no cache has seen
        temporary = self.folder / f".{self.version}.tmp"
        # a head of its own, for servers that tie the embedding to it once, when they start (vLLM)
        save_folder(plain_copy(self.model), temporary, self.tokenizer, tie_word_embeddings=False)
        shutil.rmtree(self.served_folder, ignore_errors=True)  # left by an earlier run
        temporary.rename(self.served_folder)
        self._load_weights(str(self.served_folder))
        if previous:
            shutil.rmtree(previous, ignore_errors=True)

    def _remove_served_folder(self) -> None:
        if self.world.main and self.served_folder:
            shutil.rmtree(self.served_folder, ignore_errors=True)

    def _complete_checked(self, ids: list[int], sampling: SamplingParams) -> Completion:
        """`_complete`, after checking that the completion is whole and ends as it claims to."""
        try:
            completion = self._complete(ids, sampling)
            sampled, logprobs, reason, _ = completion
            is_whole = 0 < len(sampled) == len(logprobs) and None not in logprobs
            if is_whole and reason == "length" and sampled[-1] in sampling.stop_ids:  # SGLang looks at the length first
                completion = completion._replace(finish_reason=(reason := "stop"))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Failure(f"{self.url}: an unreadable answer ({type(error).__name__}: {error}); is it the kind of "
                          "server that --rollout_engine names, and recent?") from None
        if not is_whole or reason not in ("stop", "length") or (reason == "stop") != (sampled[-1] in sampling.stop_ids):
            raise Failure(f"{self.url}: a broken answer: {len(sampled)} ids, {len(logprobs)} log-probabilities, "
                          f"finish reason {reason!r} at id {sampled[-1] if sampled else None}")
        return completion

    def _check_version(self, version: str, subject: str = "it serves") -> None:
        if version != self.version:
            raise Failure(f"{self.url}: {subject} weights {version!r}, but the last it was given are {self.version!r}")

    def _check_temperature(self, ids: list[int]) -> None:
        """Raise Failure if log-probabilities do not change with the temperature: they must be those of the sampled
        distribution."""
        cold, hot = (self._complete_checked(ids, SamplingParams(1, temperature, top_logprobs=1)).max_logprobs[0]
                     for temperature in (1, 2))
        if cold < -0.05:  # else one token has all the probability here, at any temperature: check the next rollout
            if hot > cold - 0.01:
                raise Failure(f"{self.url}: its log-probabilities are those before the temperature; "
                              f"{self.temperature_hint}")
            self.temperature_checked = True

    def _request(self, path: str, body: dict | None = None) -> dict:
        """POST `body` as JSON, or GET. Raises Failure for anything but success."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"},
                                         method="GET" if body is None else "POST")
        try:
            with OPENER.open(request, None, self.timeout) as reply:
                text = reply.read()
            return json.loads(text or "{}")
        except urllib.error.HTTPError as error:
            message = " ".join(error.read(500).decode("utf-8", "replace").split())
            raise Failure(f"{self.url}{path} answers {error.code}: {message or error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"{self.url}: no answer from the server: {first_line(error)}") from None
        except ValueError:
            raise Failure(f"{self.url}{path} does not answer in JSON") from None


@torch.no_grad()
def plain_copy(policy: nn.Module) -> MiniMindForCausalLM:
    """`policy`, whose weights must be whole, without the hooks of FSDP: its state_dict would shard them again."""
    copied = MiniMindForCausalLM(policy.config).to(policy.device)
    for target, source in zip(copied.parameters(), policy.parameters(), strict=True):
        target.copy_(source)
    return copied


@torch.no_grad()
def rounding_error(policy: nn.Module, trajectories: list[Trajectory], temperature: float) -> float:
    """Nats per sampled token between the log-probabilities of an fp32 and a bf16 copy of `policy`.

    Its weights must be whole, as for `update`.
    """
    copied, logprobs = plain_copy(policy).eval(), []
    for dtype in (torch.float32, torch.bfloat16):
        copied.to(dtype)
        for trajectory in trajectories:
            ids = torch.tensor(trajectory.tokens, device=policy.device)
            at = (torch.tensor(trajectory.action_mask).nonzero()[:, 0] + len(trajectory.prompt.ids)).to(ids.device)
            logits = copied(ids[None, :-1]).logits[0, at - 1]
            logprobs.append(token_log_probs(logits, ids[at], temperature))
    exact, rounded = map(torch.cat, (logprobs[:len(trajectories)], logprobs[len(trajectories):]))
    return (exact - rounded).abs().mean().item()


class SGLangEngine(RemoteRolloutEngine):
    """SGLang's native API (docs.sglang.io: "SGLang for RL Systems", "Native APIs"). Written after SGLang 0.5.23.

    It reports log-probabilities after the temperature unless it was started with SGLANG_RETURN_ORIGINAL_LOGPROB, and
    obeys seeds with --enable-deterministic-inference only.
    """

    temperature_hint = "start it without SGLANG_RETURN_ORIGINAL_LOGPROB"

    def _load_weights(self, folder: str) -> None:
        reply = self._request("/update_weights_from_disk", {
            "model_path": folder, "weight_version": self.version, "flush_cache": True})
        if reply.get("success") is not True:
            raise Failure(f"{self.url}: weights not updated: {reply.get('message')}")

    def _complete(self, ids: list[int], sampling: SamplingParams) -> Completion:
        params = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
                  "sampling_seed": sampling.seed, "stop_token_ids": list(sampling.stop_ids), "no_stop_trim": True}
        meta = self._request("/generate", {
            "input_ids": ids, "sampling_params": {**params, **FULL_DISTRIBUTION}, "return_logprob": True,
            "top_logprobs_num": sampling.top_logprobs or 0})["meta_info"]
        self._check_version(meta["weight_version"])
        steps = meta["output_token_logprobs"]  # (log-probability, id, text), the stop token included
        max_logprobs = [step[0][0] for step in meta["output_top_logprobs"]] if sampling.top_logprobs else []
        return Completion([step[1] for step in steps], [step[0] for step in steps], meta["finish_reason"]["type"],
                          max_logprobs)


class VLLMEngine(RemoteRolloutEngine):
    """vLLM's completions and development API (docs.vllm.ai: "Layerwise (Re)loading", "Weight Transfer"; vLLM 0.33).

    Start it with VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs.
    """

    temperature_hint = "start it with --logprobs-mode processed_logprobs"

    def _load_weights(self, folder: str) -> None:
        self._request("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        if self._request("/reset_prefix_cache?reset_running_requests=true", {}).get("success") is False:
            raise Failure(f"{self.url}: it keeps keys and values of the old weights")
        self._request("/update_weight_version", {"new_version": self.version})  # last: it vouches for the steps above

    def generate(self, prompts: list[Prompt], sampling_params: list[SamplingParams]) -> list[Trajectory]:
        """One answer to each prompt, in order. Completions carry no version, so it is checked before and after."""
        self._check_version(self._request("/weight_info").get("weight_version"))
        trajectories = super().generate(prompts, sampling_params)
        self._check_version(self._request("/weight_info").get("weight_version"))
        return trajectories

    def _complete(self, ids: list[int], sampling: SamplingParams) -> Completion:
        choice = self._request("/v1/completions", {
            "prompt": ids, "max_tokens": sampling.max_new_tokens, "seed": sampling.seed,
            "temperature": sampling.temperature, "stop_token_ids": list(sampling.stop_ids), "logprobs": 1,
            "return_token_ids": True, **FULL_DISTRIBUTION})["choices"][0]
        logprobs = choice["logprobs"]
        max_logprobs = [max(step.values()) for step in logprobs["top_logprobs"]] if sampling.top_logprobs else []
        return Completion(choice["token_ids"], logprobs["token_logprobs"], choice["finish_reason"], max_logprobs)
