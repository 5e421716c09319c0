"""PPO: an actor that answers, a critic that predicts the return, and clipped policy updates."""

import copy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from torch import Tensor, nn
from transformers.utils import ModelOutput

from model.cli import fraction, nonneg_float, run_main
from model.model_minimind import MiniMindForCausalLM
from model.model_reward import MiniMindForSequenceClassification
from model.weights import ROOT, save_weight
from trainer.arguments import parse_args, rl_parser
from trainer.losses import ppo_loss
from trainer.rl.advantages import GAE
from trainer.rl.rewards import add_reward_args, make_rewards
from trainer.rl.rollouts import RolloutStream, make_rollout_eval
from trainer.rollout_engine import add_rollout_engine_args, make_rollout_engine
from trainer.run import Run
from trainer.trainer import Trainer


@dataclass
class ActorCriticOutput(ModelOutput):
    logits: Tensor | None = None  # [M, V]
    value: Tensor | None = None  # [M], the expected sum of rewards from each of `logits_indices` on
    aux_loss: Tensor | None = None


class ActorCritic(nn.Module):
    """Two networks that are trained, wrapped and resumed as one. The critic starts from the actor's blocks."""

    def __init__(self, actor: MiniMindForCausalLM):
        super().__init__()
        self.config, self.actor = actor.config, actor
        self.critic = MiniMindForSequenceClassification.from_decoder(actor)

    def forward(self, **inputs) -> ActorCriticOutput:
        actor, critic = self.actor(**inputs), self.critic(**inputs)
        aux_loss = None if actor.aux_loss is None else actor.aux_loss + critic.aux_loss
        return ActorCriticOutput(actor.logits, critic.logits.float()[:, 0], aux_loss)


def save_actor(model: ActorCritic, *args, **metadata) -> Path:
    return save_weight(model.actor, *args, **metadata)


def main() -> None:
    parser = rl_parser(
        __doc__, data_path=str(ROOT / "dataset/rlaif.jsonl"), from_weight="full_sft", save_weight="ppo_actor",
        max_seq_len=768, batch_size=2, num_generations=1, update_epochs=2, target_kl=0.25,
        learning_rate=3e-7, epochs=1, log_interval=1, save_interval=10, wandb_project="MiniMind-PPO")
    group = parser.add_argument_group("loss")
    group.add_argument("--critic_learning_rate", type=nonneg_float, default=5e-7,
                       help="peak learning rate of the critic, on the actor's schedule")
    group.add_argument("--clip_epsilon", type=nonneg_float, default=0.2,
                       help="clip range of the ratio: from 1 - this to 1 + this")
    group.add_argument("--cliprange_value", type=nonneg_float, default=0.2,
                       help="clip range of the value update (0: no clipping)")
    group.add_argument("--vf_coef", type=nonneg_float, default=0.5, help="coefficient of the value loss")
    group.add_argument("--kl_coef", type=nonneg_float, default=0.02,
                       help="coefficient of the KL to the reference, which lowers the rewards")
    group.add_argument("--gamma", type=fraction, default=1.0, help="discount factor per token")
    group.add_argument("--lam", type=fraction, default=0.95, help="lambda of generalised advantage estimation")
    add_reward_args(parser)
    add_rollout_engine_args(parser)
    parser.set_defaults(aggregation="token", resample=0)
    args = parse_args(parser)
    if not args.learning_rate:
        parser.error("--learning_rate 0 learns nothing; give more than 0")
    with Run(args) as run:
        actor = run.load_model()
        model = ActorCritic(actor)
        run.prepare(model.actor), run.prepare(model.critic)
        prompts, val_prompts = run.load_prompts()

        # 1. Sample: answers o ~ π_θ(· | q) to each prompt q.
        engine = make_rollout_engine(args, actor, run.tokenizer, run.autocast(), run.world)
        # 2. Reward: r_t = -kl_coef · log(π_old / π_ref), and for the last token Σ_c weight_c · score_c(q, o) as well.
        rewards = make_rewards(args, run.tokenizer, run.device, prompts=prompts.prompts)
        # 3. Advantage: A_t = Σ_k (γλ)^k δ_{t+k} where δ_t = r_t + γ·V_{t+1} - V_t, whitened over the rollout.
        estimator = GAE(args.gamma, args.lam, args.kl_coef)
        # 4. Old and reference log-probabilities and values of every sampled token, before the update.
        reference = run.freeze(copy.deepcopy(actor)) if args.kl_coef else None
        rollouts = RolloutStream(run, model, prompts, engine, rewards, estimator, reference)
        # 5. Loss: -min(ρ·A, clip(ρ, 1 - ε, 1 + ε)·A) + vf_coef · ½(V - R)², where ρ = π_θ / π_old and R = A + V_old.
        loss = partial(ppo_loss, epsilon=args.clip_epsilon, value_clip=args.cliprange_value, value_coef=args.vf_coef,
                       tis_cap=args.is_cap, temperature=args.temperature)
        names = ("clip_epsilon", "cliprange_value", "vf_coef", "critic_learning_rate", "is_cap", "kl_coef", "gamma",
                 "lam", "target_kl")
        Trainer(run, model, rollouts, rollouts.track_kl(loss), save_fn=save_actor,
                settings={name: getattr(args, name) for name in names},
                lr_scales={"critic.": args.critic_learning_rate / args.learning_rate},
                validate=make_rollout_eval(run, val_prompts, engine, rewards)).fit()


if __name__ == "__main__":
    run_main(main)
