"""Online RL as a stream of optimizer steps: sample from the policy, reward, estimate advantages, learn, sample again.

A rollout answers `global_batch_size` prompts, each num_generations times; every rank samples its share and all of them
get all trajectories, so that a rollout is the same however many ranks share it. It is cut into mini-batches of packed
rows, each learned from `update_epochs` times; what is known before the update (old and reference
log-probabilities, values) is computed on the very batches that are learned from: equal weights give equal numbers.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dataset.prompts import Prompt, PromptDataset
from model.cli import Failure, UserError
from model.inference.constraints import Grammar
from model.inference.sampling import SamplingParams
from model.weights import weights_hash
from trainer.batches import GlobalBatch, global_batch_size, sampler_indices
from trainer.losses import Loss, kl_k3, model_inputs, token_log_probs
from trainer.rl.advantages import AdvantageEstimator
from trainer.rl.packing import colorize_advantages, pack_mini_batch
from trainer.rl.remote_engines import rounding_error
from trainer.rl.trajectory import RolloutGroup, Trajectory
from trainer.rollout_engine import policy_sampling_params

# Bounds of the mismatch between a server's log-probabilities and the policy's: in the first rollout MAX_ROUNDING_RATIO
# times that of a bf16 copy of the policy, later MAX_GROWTH_RATIO times that of the first rollout, and never below
# MIN_MISMATCH_BOUND nats per sampled token.
MAX_ROUNDING_RATIO, MAX_GROWTH_RATIO, MIN_MISMATCH_BOUND = 4, 5, 1e-4
NUM_BF16_SAMPLES = 16  # trajectories that the bf16 copy scores
MAX_RESAMPLES = 4  # most draws of prompts per rollout, to replace groups of equal rewards (--resample)
MAX_CPU_TOKENS = 4096  # of a micro-batch on a CPU: more are no faster there and take more memory (docs/experiments.md)
SETTINGS = ("batch_size", "num_generations", "update_epochs", "mini_batches", "temperature",
            "max_gen_len", "thinking_ratio", "aggregation", "resample", "reward_mix", "reward_weight",
            "reward_model_path", "judge_url")


class RolloutStream:
    """Has the methods of `BatchStream`. `engine` samples, `rewards` scores, `estimator` turns rewards into advantages.

    `reference`: the frozen model that the KL is measured to, or None.
    """

    def __init__(self, run, model: nn.Module, prompts: PromptDataset, engine, rewards, estimator: AdvantageEstimator,
                 reference: nn.Module | None = None):
        self.run, self.args, self.world, self.model = run, run.args, run.world, model
        self.prompts, self.engine, self.rewards = prompts, engine, rewards
        self.estimator, self.reference = estimator, reference
        args = self.args
        self.prompts_per_rollout = global_batch_size(args, self.world)
        num_answers = self.prompts_per_rollout * args.num_generations
        if args.mini_batch_size:  # answers per step, as in MiniMind
            args.mini_batches = math.ceil(num_answers / args.mini_batch_size)
        if num_answers < max(2, args.mini_batches):
            raise UserError(f"a rollout of {num_answers} answers is too small to compare them or for "
                            f"{args.mini_batches} --mini_batches; raise --batch_size or --num_generations")
        self.length = getattr(args, "max_total_len", args.max_seq_len + args.max_gen_len)  # of a trajectory
        self.steps_per_rollout = args.update_epochs * args.mini_batches
        self.steps = math.ceil(args.epochs * len(prompts) / self.prompts_per_rollout) * self.steps_per_rollout
        self.settings = {"data_path": prompts.hash, **{name: getattr(args, name) for name in SETTINGS},
                         "global_batch_size": self.prompts_per_rollout}
        if reference is not None:
            self.settings["from_weight"] = weights_hash(reference)
        self.cursor = self.rollouts = 0  # prompts drawn so far, and rollouts made
        self._mini_batches: list[GlobalBatch] = []  # of this rollout, each learned from several times,
        self._pending: list[GlobalBatch] = []  # and what of that is still to come
        self._metrics: dict[str, float] = {}
        self._approx_kl, self._num_items = torch.zeros((), device=run.device), 1  # of the last update
        self._max_mismatch = args.max_mismatch  # of a server, in nats per sampled token; None: not known yet

    def __str__(self) -> str:
        return f"{self.prompts_per_rollout} prompts x {self.args.num_generations} answers a rollout"

    # -- what the training loop calls ----------------------------------------------------------------------------------

    @property
    def can_checkpoint(self) -> bool:
        """Whether all that was sampled has been learned from, or is dropped. All ranks call it."""
        self._drop_if_moved()
        return not self._pending

    def _drop_if_moved(self) -> None:
        """Drop the rest of the rollout once the policy has moved further than --target_kl from the one that sampled."""
        if self._pending and self.args.target_kl and \
                float(self.world.sum(self._approx_kl.clone())) / self._num_items > self.args.target_kl:
            self._pending.clear()

    def epoch(self, step: int) -> float:
        """How often the prompts have been answered: more than --epochs where --target_kl or --resample drop answers."""
        return self.cursor / len(self.prompts)

    def state_dict(self) -> dict:
        """What the next rollout depends on beside the weights. All ranks call it."""
        self.estimator.before_rollout(self.measure_policy_kl)
        return {"cursor": self.cursor, "rollouts": self.rollouts, "tracker": self.estimator.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.cursor, self.rollouts = state["cursor"], state["rollouts"]
        self.estimator.load_state_dict(state["tracker"])

    def next_batch(self, step: int) -> GlobalBatch:
        """The next mini-batch of this rollout, or the first of a new one."""
        self._drop_if_moved()
        if not self._pending:
            self.rollout()
        mini_batch = self._pending.pop(0)._replace(metrics=self._metrics)
        self._approx_kl, self._num_items = torch.zeros((), device=self.run.device), mini_batch.num_items
        self._metrics = {}
        return mini_batch

    def track_kl(self, loss_function: Callable[[nn.Module, dict], Loss]) -> Callable[[nn.Module, dict], Loss]:
        """`loss_function`, adding up its `approx_kl` for --target_kl."""
        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
            result = loss_function(model, batch)
            self._approx_kl += result.metrics["approx_kl"].detach()
            return result
        return loss

    # -- one rollout ---------------------------------------------------------------------------------------------------

    def rollout(self) -> None:
        """Prepare what the next update_epochs × mini_batches steps learn from.

        1. Sample answers from the policy and reward them. 2. Pack them into mini-batches. 3. Compute old and reference
        log-probabilities; a server that sampled from other weights ends the run here. 4. Estimate advantages: last,
        because GAE needs the KL and the value of each token.
        """
        args, start = self.args, time.perf_counter()
        self.estimator.before_rollout(self.measure_policy_kl)
        with self.run.summon_full_params():
            self.engine.update()
            groups = self.sample_groups()
            trajectories = [trajectory for group in groups for trajectory in group.trajectories]
            is_first = args.rollout_engine != "local" and self._max_mismatch is None
            if is_first:
                rounding = rounding_error(self.engine.model, trajectories[:NUM_BF16_SAMPLES], args.temperature)
                self._max_mismatch = max(MAX_ROUNDING_RATIO * rounding, MIN_MISMATCH_BOUND)
        sampled = time.perf_counter()

        rng = np.random.default_rng([args.seed, self.rollouts])
        parts = np.array_split(rng.permutation(len(trajectories)), args.mini_batches)
        max_tokens = args.batch_size * self.length
        if self.run.device.type == "cpu":
            max_tokens = min(max_tokens, MAX_CPU_TOKENS)
        self._mini_batches = [pack_mini_batch(self.run, trajectories, part, max_tokens) for part in parts]

        batches = [batch for mini_batch in self._mini_batches for batch in mini_batch.micro_batches]
        self.compute_old_and_ref_logprobs(batches)
        if args.rollout_engine != "local":
            mismatch = self.check_mismatch(batches)
            if is_first:
                self._max_mismatch = max(MAX_GROWTH_RATIO * mismatch, MIN_MISMATCH_BOUND)
        self.estimator.compute_advantages(groups, batches, self.world)

        self._pending = [self._mini_batches[i] for _ in range(args.update_epochs)
                         for i in rng.permutation(args.mini_batches)]
        self.collect_metrics(groups, trajectories, sampled - start, time.perf_counter() - sampled)
        self.rollouts += 1

    def sample_groups(self) -> list[RolloutGroup]:
        """Prompts with their scored answers. --resample replaces groups whose answers all earn the same by further
        prompts (dynamic sampling: DAPO, Yu et al. 2025, section 3.2)."""
        kept, zero_std = [], []
        num_drawn = self._sampled_tokens = 0
        for _ in range(MAX_RESAMPLES if self.args.resample else 1):
            groups = self.generate_groups(self.cursor)
            self.cursor += len(groups)
            num_drawn += len(groups)
            for group in groups:
                (zero_std if group.zero_std else kept).append(group)
            if len(kept) >= self.prompts_per_rollout:
                break
        self._zero_std_fraction = len(zero_std) / num_drawn
        return (kept + zero_std)[:self.prompts_per_rollout]

    def generate_groups(self, begin: int) -> list[RolloutGroup]:
        """Answer and score the prompts from `begin` on in their endless stream: each rank some, all ranks get all."""
        args, n = self.args, self.args.num_generations
        order = sampler_indices(begin, self.prompts_per_rollout, args.seed, len(self.prompts))
        own = range(self.world.rank, len(order), self.world.size)
        prompts = [self.prompts[order[i]] for i in own for _ in range(n)]
        # a seed of its own for each position of the stream and each answer, on any number of ranks
        seeds = [((args.seed * 1_000_003 + begin + i) * n + k) % 2**63 for i in own for k in range(n)]
        sampling_params = [policy_sampling_params(args.max_gen_len, args.temperature, seed) for seed in seeds]
        trajectories = self.engine.generate(prompts, sampling_params)
        scores = self.rewards.score(prompts, trajectories)
        groups = []
        for number, i in enumerate(own):
            part = slice(number * n, number * n + n)
            total = self.rewards.total(scores[part])
            groups.append(RolloutGroup(int(order[i]), trajectories[part], scores[part], total))
        by_rank = self.world.gather(groups)
        groups = [by_rank[i % self.world.size][i // self.world.size] for i in range(len(order))]
        self._sampled_tokens += sum(sum(answer.action_mask) for group in groups for answer in group.trajectories)
        return groups

    @torch.no_grad()
    def compute_old_and_ref_logprobs(self, batches: list[dict]) -> None:
        """Add `old_logprobs` and `ref_logprobs` [M] of the sampled tokens, and a critic's `value` [M].

        Where a rollout is learned from in a single step, the policy is the old one: no `old_logprobs` are needed.
        """
        for batch in batches:
            with self.run.autocast():
                if (self.steps_per_rollout > 1 or self.estimator.needs_old_logprobs
                        or self.args.rollout_engine != "local"):
                    batch["old_logprobs"], value = self._evaluate(self.model, batch)
                    if value is not None:
                        batch["value"] = value
                if self.reference is not None:
                    batch["ref_logprobs"], _ = self._evaluate(self.reference, batch)

    def check_mismatch(self, batches: list[dict]) -> float:
        """Nats per sampled token between a server's log-probabilities of what it sampled and the policy's.

        Raises Failure if they are more than rounding explains: then the server has not loaded all weights, or damaged
        them, whatever version it reports.
        """
        errors = torch.cat([(batch["old_logprobs"] - batch["rollout_logprobs"]).abs() for batch in batches])
        total, count = self.world.sum(torch.stack((errors.sum(), errors.new_tensor(float(len(errors)))))).tolist()
        mismatch, bound = total / count, self._max_mismatch
        if not mismatch <= bound:
            raise Failure(f"{self.args.rollout_url}: its log-probabilities are {mismatch:.2g} nats per token from the "
                          f"policy's, more than the {bound:.2g} that rounding explains: it does not serve the weights "
                          "that it was given. Try another version of the server, or --rollout_engine local; "
                          "--max_mismatch sets the bound")
        return mismatch

    def _evaluate(self, model: nn.Module, batch: dict) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [M] of the sampled tokens, and their values [M] where `model` has a critic."""
        output = model(**model_inputs(batch))
        return token_log_probs(output.logits, batch["targets"], self.args.temperature), getattr(output, "value", None)

    @torch.no_grad()
    def measure_policy_kl(self) -> float:
        """KL per token from the policy that sampled this rollout to the policy now. Counted once: 0 if called again."""
        sums = torch.zeros(2, device=self.run.device)
        for batch in (batch for mini_batch in self._mini_batches for batch in mini_batch.micro_batches):
            with self.run.autocast():
                kl = kl_k3(batch["old_logprobs"], self._evaluate(self.model, batch)[0])
            sums += torch.stack((kl.sum(), kl.new_tensor(float(len(kl)))))
        self._mini_batches = []
        total, count = self.world.sum(sums).tolist()
        return total / max(count, 1)

    def collect_metrics(self, groups: list[RolloutGroup], trajectories: list[Trajectory], sampling_s: float,
                        preparing_s: float) -> None:
        """What the next log line says about this rollout: seconds, and means and spreads over its answers."""
        rewards = torch.cat([group.rewards for group in groups])
        scores = torch.cat([group.scores for group in groups])
        self._metrics = {
            "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
            "length": sum(len(trajectory.completion_ids) for trajectory in trajectories) / len(trajectories),
            "truncated": sum(trajectory.truncated for trajectory in trajectories) / len(trajectories),
            "rollout_s": sampling_s, "scoring_s": preparing_s,
            "rollout_tokens_per_s": self._sampled_tokens / sampling_s,
        }
        if self.args.num_generations > 1:
            self._metrics["alike"] = self._zero_std_fraction
        for name, column in zip(self.rewards.names, scores.unbind(1), strict=True):
            self._metrics |= {f"reward_{name}": float(column.mean()), f"reward_{name}_std": float(column.std())}
        if self.args.show_samples and self.world.main and self.rollouts % self.args.show_interval == 0:
            for batch in self._mini_batches[0].micro_batches[:1]:
                for number in range(min(self.args.show_samples, int(batch["document"].max()) + 1)):
                    print(colorize_advantages(self.run.tokenizer, batch, number), flush=True)


def make_rollout_eval(run, prompts: PromptDataset | None, engine, rewards,
                      grammar_of: Callable[[Prompt], Grammar | None] | None = None) -> Callable[[], dict] | None:
    """A validation: → {"val_reward", "val_…" of each component}, means over greedy answers to `prompts`.

    `grammar_of` a prompt: what its answer keeps to.
    """
    if prompts is None:
        return None

    def validate() -> dict:
        own = prompts.prompts[run.world.rank::run.world.size]
        with run.summon_full_params():
            engine.update()
            params = [SamplingParams(run.args.max_gen_len, temperature=0, grammar=grammar_of and grammar_of(prompt))
                      for prompt in own]
            answers = engine.generate(own, params) if own else []
        scores = rewards.score(own, answers) if own else torch.zeros(0, len(rewards.names))
        scores = torch.cat(run.world.gather(scores))
        means = dict(zip(rewards.names, scores.mean(0).tolist(), strict=True))
        return {"val_reward": float(rewards.total(scores).mean()), **{f"val_{name}": x for name, x in means.items()}}
    return validate
