"""The flags that every stage shares, under the names their users know."""

import argparse
from pathlib import Path

from dataset.token_cache import CACHE_DIR
from model.chat import TOKENIZER_DIR
from model.cli import Parser, fraction, nonneg_float, nonneg_int, positive_int
from model.loading import add_model_args
from model.weights import CHECKPOINT_DIR, OUT_DIR


def stage_parser(description: str, packs: bool = True, **defaults) -> Parser:
    """The flags of a training stage; `defaults` are the stage's own values for them.

    `packs`: whether it learns from rows of a file, tokenised once and packed (online RL samples its rows).
    """
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", help="training rows, .jsonl or .jsonl.gz")
    data.add_argument("--val_data_path", help="rows to validate on; the best weights are kept as {save_weight}_best")
    data.add_argument("--max_seq_len", type=positive_int, help="tokens in a row")
    if packs:
        data.add_argument("--packing", type=int, choices=(0, 1), default=1,
                          help="fill rows with several documents (else pad)")
        data.add_argument("--num_workers", type=nonneg_int, default=0, help="threads that tokenise (0: one a core)")
        data.add_argument("--cache_dir", default=str(CACHE_DIR), help="folder of tokenised data")
    data.add_argument("--skip_bad_rows", type=int, choices=(0, 1), default=0,
                      help="leave bad rows out instead of stopping")
    data.add_argument("--tokenizer", default=str(TOKENIZER_DIR), help="folder of the tokenizer")

    add_model_args(parser)
    group = parser.add_argument_group("weights")
    group.add_argument("--from_weight", help="weight to start from; 'none' starts at random")
    group.add_argument("--save_weight", help="name of the weight to write")
    group.add_argument("--save_dir", default=str(OUT_DIR), help="folder of weights and logs")
    group.add_argument("--checkpoint_dir", default=str(CHECKPOINT_DIR), help="folder of resume states")
    group.add_argument("--from_resume", type=int, choices=(0, 1), default=0, help="go on from the resume state, if any")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, default=2, help="passes over the data")
    group.add_argument("--max_steps", type=nonneg_int, default=0,
                       help="stop after so many steps (0: never); the schedule still spans all epochs")
    group.add_argument("--batch_size", type=positive_int, help="rows a device takes at a time")
    group.add_argument("--accumulation_steps", type=positive_int, default=1,
                       help="batches in a step: batch_size x accumulation_steps rows, on any number of devices")
    group.add_argument("--learning_rate", type=nonneg_float, help="peak; linear warm-up, then a cosine to a tenth")
    group.add_argument("--warmup_ratio", type=fraction, default=0.02, help="share of the steps that warm up")
    group.add_argument("--weight_decay", type=nonneg_float, default=0.1, help="decoupled, on matrices only")
    group.add_argument("--grad_clip", type=nonneg_float, default=1.0, help="largest gradient norm (0: no limit)")
    group.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                       help="muon: for the hidden matrices, AdamW for the rest")
    group.add_argument("--seed", type=nonneg_int, default=42, help="of weights, data order and sampling")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the best there is")
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                       help="of the matrix products; float32 where a CPU has no bfloat16 units")
    group.add_argument("--use_compile", type=int, choices=(0, 1), default=0, help="torch.compile the blocks")
    group.add_argument("--parallel", choices=("ddp", "fsdp", "deepspeed"), default="ddp",
                       help="what each rank of torchrun holds: all, a share, or as --deepspeed_config says")
    group.add_argument("--deepspeed_config", help="ZeRO stage and offloading; ready-made: trainer/deepspeed/*.json")
    group.add_argument("--activation_checkpointing", type=int, choices=(0, 1), default=0,
                       help="compute activations twice instead of keeping them")
    group.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher's; LOCAL_RANK says it too

    group = parser.add_argument_group("progress")
    group.add_argument("--log_interval", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--save_interval", type=positive_int, default=1000, help="steps between saves")
    group.add_argument("--eval_interval", type=nonneg_int, default=0, help="steps between validations (0: at the end)")
    group.add_argument("--eval_first", type=int, choices=(0, 1), default=0, help="validate before the first step too")
    group.add_argument("--use_wandb", action="store_true", help="track with SwanLab (offline when it has no network)")
    group.add_argument("--wandb_project", help="project of the tracker")
    parser.set_defaults(**{"data_path": None, **defaults})
    return parser


def rl_parser(description: str, **defaults) -> Parser:
    """The flags of an online RL stage."""
    parser = stage_parser(description, packs=False, **defaults)
    group = parser.add_argument_group("rollouts (batch_size x accumulation_steps prompts each)")
    group.add_argument("--max_gen_len", type=positive_int, default=1024, help="longest answer, in tokens")
    group.add_argument("--num_generations", type=positive_int, default=6, help="answers to a prompt")
    group.add_argument("--temperature", type=nonneg_float, default=1.0,
                       help="of sampling, and of every log-probability")
    group.add_argument("--thinking_ratio", type=fraction, default=0.9,
                       help="share of the prompts that ask for thinking")
    group.add_argument("--update_epochs", type=positive_int, default=1, help="times a rollout is learned from")
    group.add_argument("--mini_batches", type=positive_int, default=1, help="optimizer steps in each of these")
    group.add_argument("--target_kl", type=nonneg_float, default=0.0,
                       help="stop learning from a rollout once the policy has moved so far, in nats a token (0: never)")
    group.add_argument("--is_cap", type=nonneg_float, default=0.0,
                       help="weigh a token by what the sampler's rounding did to it, at most so much (0: do not)")
    group.add_argument("--show_samples", type=nonneg_int, default=0,
                       help="print so many answers a rollout, coloured by "
                       "the advantage of each token")
    return parser


# of each loss: how far below and above 1 the ratio is clipped (cispo: the largest ratio), and how its paper averages
POLICY_DEFAULTS = {"grpo": (0.2, 0.2, "sequence"), "gspo": (3e-4, 4e-4, "sequence"), "cispo": (0.0, 5.0, "token"),
                   "spo": (0.2, 0.28, "token")}


def policy_parser(description: str, **defaults) -> Parser:
    """The flags of an online RL stage without a critic."""
    parser = rl_parser(description, **defaults)
    group = parser.add_argument_group("loss")
    group.add_argument("--loss_type", choices=POLICY_DEFAULTS, default="grpo", help="spo takes one answer to a prompt")
    group.add_argument("--beta", type=nonneg_float, default=0.1,
                       help="of the KL to the weight it started from (0: no KL)")
    group.add_argument("--epsilon", type=nonneg_float,
                       help="clip the ratio at 1 - this (each loss has its own default)")
    group.add_argument("--epsilon_high", type=nonneg_float, help="clip the ratio at 1 + this; cispo: at this")
    group.add_argument("--aggregation", choices=("token", "sequence"),
                       help="mean over all tokens, or over answers of the mean over their tokens (as published)")
    group.add_argument("--scale_rewards", type=int, choices=(0, 1), default=1,
                       help="divide by the spread of a prompt's rewards")
    group.add_argument("--resample", type=int, choices=(0, 1), default=0,
                       help="draw further prompts for those whose answers all score alike")
    group.add_argument("--spo_half_life", type=nonneg_float, default=0.06,
                       help="spo: KL a token after which a prompt's past rewards count half")
    return parser


def parse_policy_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """As `parse_args`, with what the chosen loss asks for."""
    args = parse_args(parser, argv)
    low, high, aggregation = POLICY_DEFAULTS[args.loss_type]
    args.epsilon = low if args.epsilon is None else args.epsilon
    args.epsilon_high = high if args.epsilon_high is None else args.epsilon_high
    args.aggregation = args.aggregation or aggregation
    if args.loss_type == "spo":
        args.num_generations = 1
        if args.resample:
            parser.error("--resample compares the answers to one prompt, of which --loss_type spo has one")
    elif args.num_generations < 2:
        parser.error(f"--num_generations {args.num_generations}: an answer is compared with others; give 2 or more")
    return args


def policy_settings(args: argparse.Namespace) -> dict:
    """What of the loss must not change when a run is resumed, under the keys of resume states."""
    return {"kind": args.loss_type, "low": args.epsilon, "high": args.epsilon_high, "beta": args.beta,
            "is_cap": args.is_cap}


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, and make the paths absolute, so that nothing depends on the current directory later."""
    args = parser.parse_args(argv)
    if getattr(args, "temperature", 1.0) == 0:
        parser.error("--temperature 0 leaves no distribution to learn from; give more than 0")
    for name in ("data_path", "val_data_path", "cache_dir", "tokenizer", "save_dir", "checkpoint_dir",
                 "deepspeed_config"):
        value = getattr(args, name, None)
        setattr(args, name, Path(value).expanduser().absolute() if value else None)
    if args.use_moe is not None:
        args.use_moe = bool(args.use_moe)
    return args
