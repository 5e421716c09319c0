"""Prompts → trajectories, sampled from the policy: by the engine in this process, or by a server over HTTP.

Sampling is at one temperature from the whole distribution, because that is the policy whose gradient is taken: top-p,
top-k or penalties would make it another one.
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from dataset.prompts import Prompt
from model.chat import ChatTokenizer
from model.cli import Parser, UserError, nonneg_float
from model.inference.engine import Engine, SamplingParams
from trainer.distributed import World
from trainer.rl.remote_engines import RemoteRolloutEngine, SGLangEngine, VLLMEngine
from trainer.rl.trajectory import Trajectory


class LocalRolloutEngine:
    """The engine of this process on the policy's own weights: no copy, so nothing can lag behind.

    `autocast`: the context in which the policy is trained; sampling in another precision would be another policy.
    """

    def __init__(self, model: nn.Module, tokenizer: ChatTokenizer, autocast: AbstractContextManager | None = None,
                 max_batch: int = 64):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.autocast = autocast or nullcontext()

    def update(self) -> None:
        """The weights have changed. Here they are the policy's own, so nothing has to be done."""

    @contextmanager
    def open(self, num_requests: int) -> Iterator[Engine]:
        """An engine for up to `num_requests` at once, on the weights as they are now."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                yield Engine(self.model, max_batch=max(1, min(self.max_batch, num_requests)))
        finally:
            self.model.train(training)

    def generate(self, prompts: list[Prompt], sampling_params: list[SamplingParams]) -> list[Trajectory]:
        """One answer to each prompt, in the same order."""
        with self.open(len(prompts)) as engine:
            sequences = engine.generate([prompt.ids for prompt in prompts], sampling_params)
        return [Trajectory.from_completion(self.tokenizer, prompt, s.completion_ids, s.logprobs, s.finish_reason)
                for prompt, s in zip(prompts, sequences, strict=True)]


def policy_sampling_params(max_new_tokens: int, temperature: float, seed: int) -> SamplingParams:
    """How a policy is sampled for its gradient: nothing cut off, nothing penalised."""
    return SamplingParams(max_new_tokens, temperature, top_p=1.0, top_k=0, min_p=0.0, seed=seed)


def add_rollout_engine_args(parser: Parser) -> None:
    group = parser.add_argument_group("rollout engine")
    group.add_argument("--rollout_engine", choices=("local", "sglang", "vllm"), default="local",
                       type=lambda name: "local" if name == "torch" else name,  # MiniMind's name for it
                       help="local: this process samples, from the policy itself")
    group.add_argument("--rollout_url", default="http://localhost:8998", help="URL of the SGLang or vLLM server")
    group.add_argument("--rollout_dir", help="folder it reads new weights from (default: {save_dir}/rollout_weights)")
    group.add_argument("--max_mismatch", type=nonneg_float,
                       help="end the run if a server's log-probabilities are further from the policy's, in nats per "
                            "token (default: 4 times what bf16 does to the policy's, then 5 times the first rollout's)")
    parser.add_aliases(sglang_base_url="rollout_url", sglang_shared_path="rollout_dir")


def make_rollout_engine(args: argparse.Namespace, model: nn.Module, tokenizer: ChatTokenizer,
                        autocast: AbstractContextManager, world: World) -> LocalRolloutEngine | RemoteRolloutEngine:
    """The engine that --rollout_engine names. Raises UserError when a server has no usable --rollout_url."""
    if args.rollout_engine == "local":
        return LocalRolloutEngine(model, tokenizer, autocast)
    if not args.rollout_url.startswith(("http://", "https://")):
        raise UserError(f"--rollout_engine {args.rollout_engine} needs the server's --rollout_url http://HOST:PORT")
    folder = Path(args.rollout_dir or args.save_dir / "rollout_weights").expanduser().absolute()
    engine_class = SGLangEngine if args.rollout_engine == "sglang" else VLLMEngine
    return engine_class(args.rollout_url.rstrip("/"), folder, model, tokenizer, world)
