"""Online RL as a stream of steps: sample from the policy, score, turn rewards into advantages, learn, sample again.

A rollout answers G = batch_size × accumulation_steps prompts, each num_generations times; every rank samples its share,
and all of them get all trajectories, so that a rollout is the same on any number of ranks. It is cut into mini-batches
of packed rows, each learned from `update_epochs` times; whatever is known before the update (old and reference
log-probabilities, values) is computed on the very batches that are learned from: equal weights give equal numbers.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dataset.packing import best_fit, pack_shared_prefix
from dataset.prompts import PromptDataset
from model.chat import ChatTokenizer
from model.cli import UserError
from model.inference.sampling import Sampling
from trainer.batches import Step, places
from trainer.losses import Loss, gae, group_advantages, inputs, kl_k3, token_log_probs
from trainer.rollout_engine import Trajectory, policy_sampling_params

MAX_RESAMPLES = 4  # of prompts, when groups without a difference are drawn again


class RolloutStream:
    """Has the methods of `RowStream`. `engine` answers prompts, `rewards` scores the answers.

    `reference`: the frozen model that KL is measured to, or None. `critic`: whether `model` is an actor with a critic,
    whose advantages go by token; `tracker`: SPO's memory. With neither, advantages are relative to the group's mean.
    """

    def __init__(self, run, model: nn.Module, prompts: PromptDataset, engine, rewards,
                 reference: nn.Module | None = None, critic: bool = False, tracker: "SPOValueTracker | None" = None):
        self.run, self.args, self.world, self.model = run, run.args, run.world, model
        self.prompts, self.engine, self.rewards, self.reference = prompts, engine, rewards, reference
        self.critic, self.tracker = critic, tracker
        args = self.args
        self.prompts_per_rollout = args.batch_size * args.accumulation_steps
        if self.prompts_per_rollout % self.world.size:
            raise UserError(f"a rollout of {self.prompts_per_rollout} prompts (--batch_size x --accumulation_steps) "
                            f"cannot be shared evenly by {self.world.size} ranks")
        answers = self.prompts_per_rollout * args.num_generations
        if answers < max(2, args.mini_batches):
            raise UserError(f"a rollout of {answers} answers is too small to compare them or for {args.mini_batches} "
                            "--mini_batches; raise --batch_size or --num_generations")
        self.length = getattr(args, "max_total_len", args.max_seq_len + args.max_gen_len)  # of a trajectory
        self.steps = (math.ceil(args.epochs * len(prompts) / self.prompts_per_rollout)
                      * args.update_epochs * args.mini_batches)
        self.settings = {name: getattr(args, name) for name in (
            "batch_size", "accumulation_steps", "num_generations", "update_epochs", "mini_batches", "temperature",
            "max_gen_len", "thinking_ratio", "aggregation", "resample", "reward_mix")}
        self.settings["prompts"] = prompts.fingerprint
        self.cursor = self.rollouts = 0  # prompts drawn so far, and rollouts made
        self._minis: list[tuple] = []  # of this rollout, each learned from several times,
        self._pending: list[tuple] = []  # and what of that is still to come
        self._noted: dict[str, float] = {}
        self._moved, self._units = torch.zeros((), device=run.device), 1  # approximate KL of the last update

    def __str__(self) -> str:
        return f"{self.prompts_per_rollout} prompts x {self.args.num_generations} answers a rollout"

    # -- what the loop asks for ----------------------------------------------------------------------------------------

    @property
    def at_boundary(self) -> bool:
        """Whether all that was sampled has been learned from."""
        return not self._pending

    def epoch(self, step: int) -> float:
        """How often the prompts have been answered."""
        return self.cursor / len(self.prompts)

    def state_dict(self) -> dict:
        """What the next rollout depends on beside the weights. All ranks call it."""
        self._follow()
        return {"cursor": self.cursor, "rollouts": self.rollouts,
                "tracker": self.tracker.state_dict() if self.tracker else {}}

    def load_state_dict(self, state: dict) -> None:
        self.cursor, self.rollouts = state["cursor"], state["rollouts"]
        if self.tracker:
            self.tracker.load_state_dict(state["tracker"])

    def take(self, step: int) -> Step:
        """The next mini-batch of this rollout, or the first of a new one."""
        if self._pending and 0 < self.args.target_kl < float(self.world.sum(self._moved)) / self._units:
            self._pending.clear()  # it has moved far enough from what sampled
        if not self._pending:
            self._roll_out()
        batches, self._units, tokens = self._pending.pop(0)
        self._moved = torch.zeros((), device=self.run.device)
        noted, self._noted = self._noted, {}
        return Step(batches, len(batches), self._units, tokens, noted)

    def track_kl(self, loss_function: Callable[[nn.Module, dict], Loss]) -> Callable[[nn.Module, dict], Loss]:
        """`loss_function`, and note how far the policy has moved, for --target_kl."""
        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
            result = loss_function(model, batch)
            self._moved += result.metrics["approx_kl"].detach()
            return result
        return loss

    # -- one rollout ---------------------------------------------------------------------------------------------------

    def _roll_out(self) -> None:
        """Sample, score and prepare what the next update_epochs × mini_batches steps learn from."""
        args, began = self.args, time.perf_counter()
        self._follow()
        with self.run.whole():
            self.engine.update()
            groups = self._draw()
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        sampled = time.perf_counter()
        advantages = self._advantages(groups)
        dice = np.random.default_rng([args.seed, self.rollouts])
        self._minis = [self._mini_batch([trajectories[i] for i in part], advantages[part])
                       for part in np.array_split(dice.permutation(len(trajectories)), args.mini_batches)]
        every = [batch for batches, *_ in self._minis for batch in batches]
        self._look(every)
        if self.critic:
            self._judge(every)
        self._pending = [self._minis[i] for _ in range(args.update_epochs) for i in dice.permutation(args.mini_batches)]
        self._note(groups, trajectories, sampled - began, time.perf_counter() - sampled)
        self.rollouts += 1

    def _draw(self) -> "list[RolloutGroup]":
        """Prompts with their scored answers. With --resample, groups whose answers all score alike are drawn anew."""
        kept: list[RolloutGroup] = []
        spare: list[RolloutGroup] = []
        self._alike = drawn = self._own_tokens = 0
        for _ in range(MAX_RESAMPLES if self.args.resample else 1):
            groups = self._answer(self.cursor)
            self.cursor += len(groups)
            drawn += len(groups)
            for group in groups:
                (spare if group.alike else kept).append(group)
            if len(kept) >= self.prompts_per_rollout:
                break
        self._alike = len(spare) / drawn
        return (kept + spare)[:self.prompts_per_rollout]

    def _answer(self, begin: int) -> "list[RolloutGroup]":
        """Groups of the prompts at the next places of the endless stream: each rank answers some, all get all."""
        args, n = self.args, self.args.num_generations
        order = places(begin, self.prompts_per_rollout, args.seed, len(self.prompts))
        mine = range(self.world.rank, len(order), self.world.size)
        asked = [self.prompts[order[i]] for i in mine for _ in range(n)]
        # a seed of its own for each place of the stream and each answer, on any number of ranks
        how = [policy_sampling_params(args.max_gen_len, args.temperature, (args.seed * 1_000_003 + begin + i) * n + k)
               for i in mine for k in range(n)]
        trajectories = self.engine.generate(asked, how)
        scores = self.rewards.score(asked, trajectories)
        self._own_tokens += sum(sum(trajectory.action_mask) for trajectory in trajectories)
        groups = [RolloutGroup(int(order[i]), trajectories[at * n:at * n + n], scores[at * n:at * n + n],
                        self.rewards.total(scores[at * n:at * n + n])) for at, i in enumerate(mine)]
        by_rank = self.world.gather(groups)
        return [by_rank[i % self.world.size][i // self.world.size] for i in range(len(order))]

    def _advantages(self, groups: "list[RolloutGroup]") -> Tensor:
        """One number a trajectory [G · n]; with a critic its reward, from which `_judge` makes advantages."""
        rewards = torch.stack([group.rewards for group in groups])
        if self.critic:
            return rewards.flatten()
        if self.tracker:
            rewards = rewards[:, 0]
            advantages = rewards - self.tracker.values([group.prompt for group in groups])
            self.tracker.update([group.prompt for group in groups], rewards)
            return (advantages - advantages.mean()) / (advantages.std() + 1e-4)
        return group_advantages(rewards, bool(self.args.scale_rewards)).flatten()

    def _mini_batch(self, trajectories: list[Trajectory], advantages: Tensor) -> tuple[list[dict], int, int]:
        """Trajectories → this rank's micro-batches, the units of all ranks, the tokens that are read.

        A micro-batch has what `pack_shared_prefix` gives and, of each target [M]: `document`, which trajectory of the
        micro-batch it belongs to, `advantage`, `weight` and `rollout_logprobs`.
        """
        args, world, by_sequence = self.args, self.world, self.args.aggregation == "sequence"
        budget = args.batch_size * self.length  # tokens of a micro-batch
        if not args.use_compile:  # no shape has to stay: there is something for each rank
            budget = min(budget, -(-sum(len(trajectory.tokens) for trajectory in trajectories) // world.size))
        trees = group_by_prefix(trajectories, budget)
        sizes = np.array([tree.size for tree in trees])
        budget = max(budget, int(sizes.max()))
        place, batches = best_fit(sizes, budget), []
        for number in range(world.rank, -(-(int(place.max()) + 1) // world.size) * world.size, world.size):
            mine = [trees[i] for i in np.flatnonzero(place == number)]
            size = budget if args.use_compile else -(-max(sum(tree.size for tree in mine), 1) // 64) * 64
            batch = pack_shared_prefix(
                [(tree.prompt, [trajectories[i].completion_ids for i in tree.answers]) for tree in mine], size)
            numbers = torch.tensor([i for tree in mine for i in tree.answers], dtype=torch.int64)
            answers = [trajectories[i] for i in numbers]
            lengths = torch.tensor([len(answer.completion_ids) for answer in answers], dtype=torch.int64)
            weight = torch.tensor([1 / sum(answer.action_mask) if by_sequence else 1.0 for answer in answers])
            batch |= {"document": torch.arange(len(answers)).repeat_interleave(lengths),
                      "advantage": advantages[numbers].repeat_interleave(lengths),
                      "weight": weight.repeat_interleave(lengths),
                      "rollout_logprobs": torch.tensor([logp for answer in answers for logp in answer.logprobs])}
            drawn = torch.tensor([drawn for answer in answers for drawn in answer.action_mask], dtype=torch.bool)
            for name in ("logits_indices", "targets", "document", "advantage", "weight", "rollout_logprobs"):
                batch[name] = batch[name][drawn]
            batches.append({name: value.to(self.run.device) for name, value in batch.items()})
        units = len(trajectories) if by_sequence else sum(sum(trajectory.action_mask) for trajectory in trajectories)
        return batches, units, int(sizes.sum())

    @torch.no_grad()
    def _look(self, batches: list[dict]) -> None:
        """What the models say before the update, added to the batches: `old_logprobs`, `ref_logprobs`, `value`."""
        several = self.args.update_epochs * self.args.mini_batches > 1
        for batch in batches:
            with self.run.autocast():
                if self.critic:
                    output, batch["value"] = self.model(**inputs(batch))
                    batch["old_logprobs"] = token_log_probs(output.logits, batch["targets"], self.args.temperature)
                elif several or self.tracker:
                    batch["old_logprobs"] = self._log_probs(self.model, batch)
                if self.reference is not None:
                    batch["ref_logprobs"] = self._log_probs(self.reference, batch)

    def _log_probs(self, model: nn.Module, batch: dict) -> Tensor:
        logits = model(**inputs(batch)).logits
        return token_log_probs(logits, batch["targets"], self.args.temperature)

    def _judge(self, batches: list[dict]) -> None:
        """PPO: `advantage` (whitened over the rollout) and `returns` of each token, from rewards, KL and values.

        A token is rewarded with -kl_coef · log(p / p_ref), the last one of a trajectory with its reward too.
        """
        args, sums = self.args, torch.zeros(3, dtype=torch.float64, device=self.run.device)
        for batch in batches:
            reward = -args.kl_coef * (batch["old_logprobs"] - batch["ref_logprobs"]) if "ref_logprobs" in batch else \
                torch.zeros_like(batch["old_logprobs"])
            ends = batch["document"].diff(append=batch["document"].new_tensor([-1])) != 0
            reward[ends] += batch["advantage"][ends]
            sizes = batch["document"].bincount().tolist()
            parts = zip(reward.split(sizes), batch["value"].split(sizes), strict=True)
            advantages = [gae(*part, args.gamma, args.lam) for part in parts if len(part[0])]
            batch["advantage"] = torch.cat(advantages) if advantages else reward
            batch["returns"] = batch["advantage"] + batch["value"]
            one = batch["advantage"].double()
            sums += torch.stack((one.new_tensor(len(one)), one.sum(), one.square().sum()))
        count, total, squares = self.world.sum(sums).tolist()
        mean = total / count
        std = math.sqrt(max(squares / count - mean**2, 0))
        for batch in batches:
            batch["advantage"] = (batch["advantage"] - mean) / (std + 1e-8)

    @torch.no_grad()
    def _follow(self) -> None:
        """Tell the tracker, once, how far the policy has moved since the last rollout was sampled: KL a token."""
        if not self.tracker:
            return
        sums = torch.zeros(2, device=self.run.device)
        for batch in (batch for batches, *_ in self._minis for batch in batches):
            with self.run.autocast():
                moved = kl_k3(batch["old_logprobs"], self._log_probs(self.model, batch))
            sums += torch.stack((moved.sum(), moved.new_tensor(float(len(moved)))))
        total, count = self.world.sum(sums).tolist()
        self.tracker.drift += total / max(count, 1)
        self._minis = []

    def _note(self, groups: "list[RolloutGroup]", trajectories: list[Trajectory], sampling: float,
              preparing: float) -> None:
        """What the next log line says of this rollout: times in seconds, means and spreads over its answers."""
        rewards = torch.cat([group.rewards for group in groups])
        scores = torch.cat([group.scores for group in groups])
        self._noted = {
            "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
            "length": sum(map(len, (trajectory.completion_ids for trajectory in trajectories))) / len(trajectories),
            "truncated": sum(t.finish_reason != "stop" for t in trajectories) / len(trajectories),
            "rollout_s": sampling, "scoring_s": preparing, "rollout_tokens_per_s": self._own_tokens / sampling,
        }
        if self.args.num_generations > 1:
            self._noted["alike"] = self._alike
        for name, of_one in zip(self.rewards.names, scores.unbind(1), strict=True):
            self._noted |= {f"reward_{name}": float(of_one.mean()), f"reward_{name}_std": float(of_one.std())}
        if self.args.show_samples and self.world.main:
            for batch in self._minis[0][0][:1]:
                for number in range(min(self.args.show_samples, int(batch["document"].max()) + 1)):
                    print(colorize_advantages(self.run.tokenizer, batch, number), flush=True)


@dataclass
class RolloutGroup:
    """A prompt, by its number, and its scored answers: `scores` [n, components], `rewards` [n]."""

    prompt: int
    trajectories: list[Trajectory]
    scores: Tensor
    rewards: Tensor

    @property
    def alike(self) -> bool:
        """Whether no answer is better than another, so that nothing can be learned from them."""
        return bool((self.rewards == self.rewards[0]).all())


@dataclass
class PrefixGroup:
    """A prompt and answers to it, by number, that are learned from together; `size` in tokens, the prompt once."""

    prompt: list[int]
    answers: list[int]
    size: int


def group_by_prefix(trajectories: list[Trajectory], budget: int) -> list[PrefixGroup]:
    """Answers to one prompt share a tree as long as it has at most `budget` tokens."""
    trees, last = [], {}
    for number, trajectory in enumerate(trajectories):
        prompt, own = tuple(trajectory.prompt.ids), len(trajectory.completion_ids) - 1
        tree = last.get(prompt)
        if tree is None or tree.size + own > budget:
            tree = last[prompt] = PrefixGroup(trajectory.prompt.ids, [], len(prompt))
            trees.append(tree)
        tree.answers.append(number)
        tree.size += own
    return trees


class SPOValueTracker:
    """SPO's memory of what each prompt is worth (Xu & Ding 2025, https://arxiv.org/abs/2509.13232, section 3).

    v ← v + (r - v) / (ρ·n + 1) and n ← ρ·n + 1, where ρ = 2^(-D / half_life) forgets as far as the policy has drifted
    by D (KL a token) since the prompt was last answered. One never answered is worth the mean of all rewards so far.
    """

    def __init__(self, prompts: int, half_life: float, smallest: float = 0.875, largest: float = 0.96):
        self.half_life, self.bounds, self.drift = half_life, (smallest, largest), 0.0
        self.value, self.count, self.seen_at = (torch.zeros(prompts, dtype=torch.float64) for _ in range(3))
        self.all = [0.0, 0]  # sum and number of all rewards

    def values(self, prompts: list[int]) -> Tensor:
        """What an answer to each of `prompts` is expected to be rewarded with."""
        mean = self.all[0] / max(self.all[1], 1)
        return self.value[prompts].where(self.count[prompts] > 0, mean).float()

    def update(self, prompts: list[int], rewards: Tensor) -> None:
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            forget = 2 ** (-(self.drift - float(self.seen_at[prompt])) / self.half_life)
            count = min(max(forget, self.bounds[0]), self.bounds[1]) * self.count[prompt] + 1
            self.value[prompt] += (reward - self.value[prompt]) / count
            self.count[prompt], self.seen_at[prompt] = count, self.drift
            self.all = [self.all[0] + reward, self.all[1] + 1]

    def state_dict(self) -> dict:
        return {"value": self.value, "count": self.count, "seen_at": self.seen_at, "drift": self.drift, "all": self.all}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def make_rollout_eval(run, prompts: PromptDataset | None, engine, rewards) -> Callable[[], dict] | None:
    """A validation: → {"val_reward", "val_…" of each component}, means over greedy answers to `prompts`."""
    if prompts is None:
        return None

    def validate() -> dict:
        mine = prompts.prompts[run.world.rank::run.world.size]
        with run.whole():
            engine.update()
            answers = engine.generate(mine, [Sampling(run.args.max_gen_len, temperature=0)] * len(mine)) if mine else []
        scores = rewards.score(mine, answers) if mine else torch.zeros(0, len(rewards.names))
        every = torch.cat(run.world.gather(scores))
        means = dict(zip(rewards.names, every.mean(0).tolist(), strict=True))
        return {"val_reward": float(rewards.total(every).mean()), **{f"val_{name}": x for name, x in means.items()}}
    return validate


def colorize_advantages(tokenizer: ChatTokenizer, batch: dict[str, Tensor], number: int) -> str:
    """The sampled tokens of trajectory `number` for a terminal: green where the advantage is above 0, red below."""
    inside = batch["document"] == number
    advantages, pieces = batch["advantage"][inside].tolist(), []
    for token, advantage in zip(batch["targets"][inside].tolist(), advantages, strict=True):
        shade = 40 + int(160 * min(abs(advantage), 2) / 2)
        red, green = (0, shade) if advantage > 0 else (shade, 0)
        text = tokenizer.decode([token], keep_special_tokens=True).replace("\n", "⏎")
        pieces.append(f"\x1b[48;2;{red};{green};0m{text}\x1b[0m")
    return f"{sum(advantages) / max(len(advantages), 1):+.2f} " + "".join(pieces)
