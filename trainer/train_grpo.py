"""GRPO, CISPO, GSPO and SPO: learn from one's own answers; how much better than expected each was is its advantage."""

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
from trainer.rl.rewards import add_reward_args, make_rewards
from trainer.rl.rollouts import RolloutStream, SPOValueTracker, make_rollout_eval
from trainer.rollout_engine import add_rollout_engine_args, make_rollout_engine
from trainer.trainer import Run


def main() -> None:
    parser = policy_parser(
        __doc__, data_path=str(ROOT / "dataset/rlaif.jsonl"), from_weight="full_sft", save_weight="grpo",
        max_seq_len=768, batch_size=2, learning_rate=3e-7, weight_decay=0.0, epochs=1, log_interval=1,
        save_interval=10, wandb_project="MiniMind-GRPO")
    add_reward_args(parser)
    add_rollout_engine_args(parser)
    args = parse_policy_args(parser)
    with Run(args) as run:
        model = run.prepare(run.load_model())
        reference = run.frozen(copy.deepcopy(model)) if args.beta else None
        prompts, val_prompts = run.prompts(args.data_path), run.prompts(args.val_data_path)
        engine = make_rollout_engine(args, model, run.tokenizer, run.autocast(), run.world)
        rewards = make_rewards(args, run.tokenizer, run.device)
        tracker = SPOValueTracker(len(prompts), args.spo_half_life) if args.loss_type == "spo" else None
        rollouts = RolloutStream(run, model, prompts, engine, rewards, reference, tracker=tracker)
        loss = partial(policy_loss, loss_type=args.loss_type, clip_low=args.epsilon, clip_high=args.epsilon_high,
                       beta=args.beta, tis_cap=args.is_cap, temperature=args.temperature)
        run.fit(model, rollouts, rollouts.track_kl(loss), validate=make_rollout_eval(run, val_prompts, engine, rewards),
                **policy_settings(args))


if __name__ == "__main__":
    run_main(main)
