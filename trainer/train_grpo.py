"""GRPO, CISPO, GSPO and SPO: learn from the policy's own answers, weighted by how much they exceed expectations."""

import copy
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.cli import run_main
from model.weights import ROOT
from trainer.arguments import parse_policy_args, policy_parser, policy_settings
from trainer.losses import policy_loss
from trainer.rl.advantages import GroupRelative, SPOValueTracker
from trainer.rl.rewards import add_reward_args, make_rewards
from trainer.rl.rollouts import RolloutStream, make_rollout_eval
from trainer.rollout_engine import add_rollout_engine_args, make_rollout_engine
from trainer.run import Run
from trainer.trainer import Trainer


def main() -> None:
    parser = policy_parser(
        __doc__, data_path=str(ROOT / "dataset/rlaif.jsonl"), from_weight="full_sft", save_weight="grpo",
        max_seq_len=768, batch_size=2, learning_rate=3e-7, epochs=1, log_interval=1,
        save_interval=10, wandb_project="MiniMind-GRPO")
    add_reward_args(parser)
    add_rollout_engine_args(parser)
    args = parse_policy_args(parser)
    with Run(args) as run:
        policy = run.prepare(run.load_model())
        prompts, val_prompts = run.load_prompts()

        # 1. Sample: answers o_1 … o_n ~ π_θ(· | q) to each prompt q.
        engine = make_rollout_engine(args, policy, run.tokenizer, run.autocast(), run.world)
        # 2. Reward: r_i = Σ_c weight_c · score_c(q, o_i).
        rewards = make_rewards(args, run.tokenizer, run.device, prompts=prompts.prompts)
        # 3. Advantage: A_i = (r_i - mean r) / std r over the answers to q; SPO: r - v(q), whitened over the rollout.
        estimator = (SPOValueTracker(len(prompts), args.spo_half_life) if args.loss_type == "spo"
                     else GroupRelative(scale=bool(args.scale_rewards)))
        # 4. Old and reference log-probabilities: log π_old and log π_ref of every sampled token, before the update.
        reference = run.freeze(copy.deepcopy(policy)) if args.beta else None
        rollouts = RolloutStream(run, policy, prompts, engine, rewards, estimator, reference)
        # 5. Loss: -min(ρ·A, clip(ρ, 1 - ε_low, 1 + ε_high)·A) + β·KL(π_θ ‖ π_ref), where ρ = π_θ / π_old.
        loss = partial(policy_loss, loss_type=args.loss_type, clip_low=args.epsilon, clip_high=args.epsilon_high,
                       beta=args.beta, tis_cap=args.is_cap, temperature=args.temperature)
        Trainer(run, policy, rollouts, rollouts.track_kl(loss), settings=policy_settings(args),
                validate=make_rollout_eval(run, val_prompts, engine, rewards)).fit()


if __name__ == "__main__":
    run_main(main)
