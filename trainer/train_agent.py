"""Agentic RL: the model calls tools, reads what they say and answers; the reward comes at the end of the episode."""

import copy
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.cli import SWITCH, num_positions, positive_int, run_main
from model.weights import ROOT
from trainer.arguments import parse_policy_args, policy_parser, policy_settings
from trainer.losses import policy_loss
from trainer.rl.advantages import GroupRelative
from trainer.rl.agent_rewards import AGENT_REWARD_MIX, AGENT_REWARDS, find_unrewarded
from trainer.rl.episodes import EpisodeEngine, call_grammar
from trainer.rl.rewards import add_reward_args, make_rewards
from trainer.rl.rollouts import RolloutStream, make_rollout_eval
from trainer.rollout_engine import add_rollout_engine_args, make_rollout_engine
from trainer.run import Run
from trainer.trainer import Trainer


def main() -> None:
    parser = policy_parser(
        __doc__, data_path=str(ROOT / "dataset/agent_rl.jsonl"), from_weight="full_sft", save_weight="agent",
        max_seq_len=1024, max_gen_len=768, batch_size=2, num_generations=4, learning_rate=3e-7,
        epochs=1, thinking_ratio=0.1, log_interval=1, save_interval=10,
        wandb_project="MiniMind-Agent-RL")
    parser.add_argument("--max_total_len", type=num_positions, default=2500, help="longest episode, in tokens")
    parser.add_argument("--max_turns", type=positive_int, default=3,
                        help="maximum number of assistant turns in an episode")
    parser.add_argument("--constrained", **SWITCH, default=0,
                        help="constrain tool calls in validation to valid ones by a grammar")
    add_reward_args(parser)
    add_rollout_engine_args(parser)
    parser.set_defaults(reward_mix=AGENT_REWARD_MIX)
    args = parse_policy_args(parser)
    if args.loss_type == "spo" or args.max_total_len <= args.max_seq_len:
        parser.error("--loss_type spo is for single answers: use train_grpo.py" if args.loss_type == "spo" else
                     f"--max_total_len {args.max_total_len} leaves no room after --max_seq_len {args.max_seq_len}")
    if args.constrained and (args.rollout_engine != "local" or not args.val_data_path):
        parser.error("--constrained 1 is for validating: it needs --val_data_path and --rollout_engine local")
    if args.judge_url or args.reward_model_path:
        parser.error("--judge_url and --reward_model_path score single answers; --reward_weight scores episodes")
    with Run(args) as run:
        policy = run.prepare(run.load_model())
        prompts, val_prompts = run.load_prompts()
        for warning in find_unrewarded(prompts):
            run.print_main(f"data: {warning}")

        # 1. Sample: episodes o_1 … o_n of turns ~ π_θ and the results of the tools they call, for each prompt q.
        sampler = make_rollout_engine(args, policy, run.tokenizer, run.autocast(), run.world)
        engine = EpisodeEngine(sampler, run.tokenizer, args.max_turns, args.max_total_len, args.seed)
        # 2. Reward: r_i = Σ_c weight_c · score_c(q, o_i), of the whole episode.
        rewards = make_rewards(args, run.tokenizer, run.device, AGENT_REWARDS, prompts.prompts)
        # 3. Advantage: A_i = (r_i - mean r) / std r over the episodes of q.
        estimator = GroupRelative(scale=bool(args.scale_rewards))
        # 4. Old and reference log-probabilities of every sampled token; observations are not trained.
        reference = run.freeze(copy.deepcopy(policy)) if args.beta else None
        rollouts = RolloutStream(run, policy, prompts, engine, rewards, estimator, reference)
        # 5. Loss: CISPO's -sg(min(ρ, ε_high))·A·log π_θ + β·KL(π_θ ‖ π_ref) where ρ = π_θ / π_old, or --loss_type.
        loss = partial(policy_loss, loss_type=args.loss_type, clip_low=args.epsilon, clip_high=args.epsilon_high,
                       beta=args.beta, tis_cap=args.is_cap, temperature=args.temperature)
        settings = policy_settings(args) | {"max_turns": args.max_turns, "max_total_len": args.max_total_len}
        grammar_of = partial(call_grammar, run.tokenizer) if args.constrained else None  # of validation's episodes
        Trainer(run, policy, rollouts, rollouts.track_kl(loss), settings=settings,
                validate=make_rollout_eval(run, val_prompts, engine, rewards, grammar_of)).fit()


if __name__ == "__main__":
    run_main(main)
