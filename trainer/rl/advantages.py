"""Advantage estimators: how much better than expected was what the policy sampled?

    GroupRelative     A = (r - mean r) / std r over the answers to one prompt    GRPO, GSPO, CISPO: one value per answer
    SPOValueTracker   A = r - v(prompt), whitened over the rollout               SPO: one value per answer
    GAE               A_t = Σ_k (γλ)^k δ_{t+k}, whitened over the rollout        PPO: one value per token

A stage hands one to `RolloutStream`, which calls `compute_advantages` once per rollout, when its batches are packed and
hold what is known before the update: GAE needs the KL and the critic's value of each token.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.distributed import World
from trainer.rl.trajectory import RolloutGroup

Batch = dict[str, Tensor]


class AdvantageEstimator:
    needs_old_logprobs = False  # even where a rollout is learned from in a single step

    def compute_advantages(self, groups: list[RolloutGroup], batches: list[Batch], world: World) -> None:
        """Add `advantage` [M], of each sampled token, to this rank's micro-batches.

        `groups`: those of all ranks. `batch["trajectory"]` [M]: the index of each sampled token's trajectory, when the
        trajectories of all groups are one list.
        """
        raise NotImplementedError

    def before_rollout(self, measure_kl: Callable[[], float]) -> None:
        """The policy will sample again; `measure_kl()` is its KL per token to the policy that sampled last."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""


def broadcast_to_tokens(advantages: Tensor, batches: list[Batch]) -> None:
    """Give every token the advantage of its trajectory: `advantages` [trajectories of the rollout]."""
    for batch in batches:
        batch["advantage"] = advantages.to(batch["trajectory"].device)[batch["trajectory"]]


# -- relative to the group (Shao et al. 2024, https://arxiv.org/abs/2402.03300) ----------------------------------------


def group_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """A = r - mean(r), and / std(r) if `scale`, over the n answers to each prompt: rewards [G, n] → [G, n].

    GRPO (Shao et al. 2024, section 4.1.2); without the division: Dr. GRPO (Liu et al. 2025).
    """
    rewards = rewards - rewards[:, :1]  # so that equal rewards have exactly no advantage
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, keepdim=True) + 1e-4) if scale else advantages


class GroupRelative(AdvantageEstimator):
    """`group_advantages` of the rewards."""

    def __init__(self, scale: bool):
        self.scale = scale

    def compute_advantages(self, groups, batches, world):
        rewards = torch.stack([group.rewards for group in groups])  # [G, n]
        broadcast_to_tokens(group_advantages(rewards, self.scale).flatten(), batches)


# -- relative to what the prompt earned before (Xu & Ding 2025, https://arxiv.org/abs/2509.13232) ----------------------


class SPOValueTracker(AdvantageEstimator):
    """A = r - v(prompt), whitened over the rollout; v is tracked over the course of training (section 3).

    v ← v + (r - v) / (ρ·n + 1) and n ← ρ·n + 1, where ρ = 2^(-D / half_life) forgets as far as the policy has drifted
    by D (KL per token) since the prompt was last answered. A prompt without an answer yet has the mean of all rewards.
    """

    needs_old_logprobs = True  # the drift is measured to them

    def __init__(self, num_prompts: int, half_life: float, min_decay: float = 0.875, max_decay: float = 0.96):
        self.half_life, self.min_decay, self.max_decay, self.drift = half_life, min_decay, max_decay, 0.0
        self.value, self.count, self.seen_at = (torch.zeros(num_prompts, dtype=torch.float64) for _ in range(3))
        self.all = [0.0, 0]  # sum and number of all rewards

    def compute_advantages(self, groups, batches, world):
        prompts = [group.prompt_index for group in groups]
        rewards = torch.stack([group.rewards[0] for group in groups])  # one answer per prompt
        advantages = rewards - self.values(prompts)
        self.update(prompts, rewards)
        broadcast_to_tokens((advantages - advantages.mean()) / (advantages.std() + 1e-4), batches)

    def values(self, prompts: list[int]) -> Tensor:
        """The expected reward of an answer to each of `prompts`."""
        mean = self.all[0] / max(self.all[1], 1)
        return self.value[prompts].where(self.count[prompts] > 0, mean).float()

    def update(self, prompts: list[int], rewards: Tensor) -> None:
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            decay = 2 ** (-(self.drift - float(self.seen_at[prompt])) / self.half_life)
            count = min(max(decay, self.min_decay), self.max_decay) * self.count[prompt] + 1
            self.value[prompt] += (reward - self.value[prompt]) / count
            self.count[prompt], self.seen_at[prompt] = count, self.drift
            self.all = [self.all[0] + reward, self.all[1] + 1]

    def before_rollout(self, measure_kl):
        self.drift += measure_kl()

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("value", "count", "seen_at", "drift", "all")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


# -- generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438) -------------------------


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages [T] of one trajectory from the rewards and values [T] of its tokens; nothing follows the last.

    A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} - V_t (Schulman et al. 2016, eq. 16).
    """
    deltas = (rewards + gamma * F.pad(values[1:], (0, 1)) - values).tolist()
    following = 0.0
    for t in reversed(range(len(deltas))):
        deltas[t] = following = deltas[t] + gamma * lam * following
    return values.new_tensor(deltas)


class GAE(AdvantageEstimator):
    """PPO's advantages from a critic's values, and `returns` [M] = A + V, the critic's targets.

    A token's reward is -kl_coef · log(π_old / π_ref); the last token of a trajectory earns the trajectory's too.
    """

    needs_old_logprobs = True

    def __init__(self, gamma: float, lam: float, kl_coef: float):
        self.gamma, self.lam, self.kl_coef = gamma, lam, kl_coef

    def compute_advantages(self, groups, batches, world):
        trajectory_rewards = torch.cat([group.rewards for group in groups])
        for batch in batches:
            rewards = self.token_rewards(batch, trajectory_rewards.to(batch["value"].device))
            lengths = batch["document"].bincount().tolist()  # of the trajectories, in sampled tokens
            parts = zip(rewards.split(lengths), batch["value"].split(lengths), strict=True)
            advantages = [gae(*part, self.gamma, self.lam) for part in parts if len(part[0])]
            batch["advantage"] = torch.cat([rewards[:0], *advantages])
            batch["returns"] = batch["advantage"] + batch["value"]
        whiten(batches, world)

    def token_rewards(self, batch: Batch, trajectory_rewards: Tensor) -> Tensor:
        """The rewards [M] of the sampled tokens."""
        if "ref_logprobs" in batch:
            rewards = -self.kl_coef * (batch["old_logprobs"] - batch["ref_logprobs"])
        else:
            rewards = torch.zeros_like(batch["old_logprobs"])
        is_last = batch["trajectory"].diff(append=batch["trajectory"].new_tensor([-1])) != 0
        rewards[is_last] += trajectory_rewards[batch["trajectory"][is_last]]
        return rewards


def whiten(batches: list[Batch], world: World) -> None:
    """A ← (A - mean) / std over the tokens of all batches and ranks."""
    device = batches[0]["advantage"].device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
    sums = torch.zeros(3, dtype=dtype, device=device)
    for advantages in (batch["advantage"].to(dtype) for batch in batches):
        sums += torch.stack((advantages.new_tensor(len(advantages)), advantages.sum(), advantages.square().sum()))
    count, total, squares = world.sum(sums).tolist()
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0))
    for batch in batches:
        batch["advantage"] = (batch["advantage"] - mean) / (std + 1e-8)
