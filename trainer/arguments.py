"""The flags of the training stages."""

import argparse
from pathlib import Path

from dataset.token_cache import CACHE_DIR
from model.chat import TOKENIZER_DIR
from model.cli import (
    SWITCH,
    Parser,
    first_line,
    fraction,
    nonneg_float,
    nonneg_int,
    notice,
    num_positions,
    positive_float,
    positive_int,
    seed_int,
    whole_number,
)
from model.loading import add_model_args
from model.weights import CHECKPOINT_DIR, OUT_DIR, check_name

num_rows = whole_number(1, 2**20)


def stage_parser(description: str, packs: bool = True, **defaults) -> Parser:
    """The flags that all stages share, with the stage's own `defaults`.

    `packs`: whether the stage learns from rows of a file, tokenised once and packed (online RL samples its rows).
    """
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="training rows: .jsonl, .json, .csv, .parquet; formats: dataset/formats.py")
    group.add_argument("--val_data_path", help="rows to validate on; the best weights are kept as {save_weight}_best")
    group.add_argument("--max_seq_len", type=num_positions, help="tokens per row")
    if packs:
        group.add_argument("--packing", **SWITCH, default=1, help="fill rows with several documents (else pad)")
        group.add_argument("--num_workers", type=whole_number(0, 1024), default=0,
                           help="threads that tokenise (0: one per core)")
        group.add_argument("--cache_dir", default=str(CACHE_DIR), help="folder of tokenised data")
    group.add_argument("--skip_bad_rows", **SWITCH, default=0, help="leave bad rows out instead of stopping")
    group.add_argument("--tokenizer", help="folder of the tokenizer (that of --from_weight; model/ for a new model)")

    add_model_args(parser)
    group = parser.add_argument_group("weights")
    group.add_argument("--from_weight", help="weight to start from; 'none' starts at random")
    group.add_argument("--save_weight", help="name of the weight to write")
    group.add_argument("--save_dir", default=str(OUT_DIR), help="folder of weights and logs")
    group.add_argument("--checkpoint_dir", default=str(CHECKPOINT_DIR), help="folder of resume states")
    group.add_argument("--from_resume", **SWITCH, default=0, help="continue from the resume state, if there is one")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_float, default=2, help="passes over the data; 0.25: over a quarter")
    group.add_argument("--max_steps", type=nonneg_int, default=0,
                       help="stop after this many steps (0: no limit); the schedule still spans all epochs")
    group.add_argument("--batch_size", type=num_rows,
                       help="rows (online RL: prompts) per device and micro-step (default: less for a small file)")
    group.add_argument("--accumulation_steps", type=num_rows, default=1,
                       help="micro-steps per step: batch_size x accumulation_steps rows on each device")
    group.add_argument("--global_batch_size", type=num_rows,
                       help="rows per step of all devices together; the number of micro-steps follows, of at most "
                            "--batch_size rows per device")
    group.add_argument("--learning_rate", type=nonneg_float, help="peak learning rate, after a linear warm-up")
    group.add_argument("--lr_schedule", choices=("cosine", "wsd"), default="cosine",
                       help="cosine: decay to a tenth of the peak; wsd: constant, then linear to 0 over the last fifth")
    group.add_argument("--warmup_ratio", type=fraction, default=0.0, help="fraction of the steps used for warm-up")
    group.add_argument("--weight_decay", type=nonneg_float, default=0.01,
                       help="decoupled weight decay, on matrices only")
    group.add_argument("--grad_clip", type=nonneg_float, default=1.0, help="largest gradient norm (0: no limit)")
    group.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                       help="muon: for the hidden matrices, AdamW for the rest")
    group.add_argument("--seed", type=seed_int, default=42,
                       help="random seed of initial weights, data order and sampling")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto: the best available")
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                       help="of the matrix products; without bfloat16 units it is float16 on a GPU, float32 on a CPU")
    group.add_argument("--use_compile", **SWITCH, help="torch.compile the blocks (default: on NVIDIA GPUs)")
    group.add_argument("--adapt_threads", **SWITCH, default=1, help="on a CPU: use fewer threads while other programs "
                       "are busy; sums are then rounded in another order (default: %(default)s)")
    group.add_argument("--parallel", choices=("ddp", "fsdp", "deepspeed"), default="ddp",
                       help="each rank of torchrun holds everything, a shard, or what --deepspeed_config says")
    group.add_argument("--deepspeed_config", help="ZeRO stage and offloading; ready-made: trainer/deepspeed/*.json")
    group.add_argument("--activation_checkpointing", **SWITCH, default=0,
                       help="recompute activations instead of keeping them")
    group.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; we read LOCAL_RANK

    group = parser.add_argument_group("progress")
    group.add_argument("--log_interval", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--save_interval", type=positive_int, default=1000, help="steps between saves")
    group.add_argument("--eval_interval", type=nonneg_int, default=0, help="steps between validations (0: at the end)")
    group.add_argument("--eval_first", **SWITCH, default=0, help="validate before the first step too")
    group.add_argument("--use_wandb", action="store_true", help="track with SwanLab (offline without a network)")
    group.add_argument("--wandb_project", help="project name in the tracker")
    group.add_argument("--wandb_run_name", help="run name in the tracker (default: name of the weight)")
    parser.add_aliases(out_dir="save_dir", ddp=None)
    parser.set_defaults(**{"data_path": None, **defaults})
    return parser


def add_sft_args(parser: argparse.ArgumentParser) -> None:
    """The flags of stages that learn from conversations."""
    parser.add_argument("--system_prompt_ratio", type=fraction, default=0.2,
                        help="share of the conversations without a system prompt that get one")
    parser.add_argument("--empty_think_ratio", type=fraction, default=0.2,
                        help="share of the conversations that keep their empty think blocks")


def sft_options(args: argparse.Namespace) -> dict:
    """The keyword arguments of `SFTDataset`."""
    return {name: getattr(args, name) for name in ("seed", "system_prompt_ratio", "empty_think_ratio")}


def rl_parser(description: str, **defaults) -> Parser:
    """The flags of an online RL stage."""
    parser = stage_parser(description, packs=False, **defaults)
    group = parser.add_argument_group("rollouts (batch_size x accumulation_steps prompts on each device)")
    group.add_argument("--max_gen_len", type=num_positions, default=1024, help="longest answer, in tokens")
    group.add_argument("--num_generations", type=num_rows, default=6, help="answers per prompt")
    group.add_argument("--temperature", type=nonneg_float, default=1.0,
                       help="sampling temperature, also of every log-probability")
    group.add_argument("--thinking_ratio", type=fraction, default=0.9,
                       help="share of the prompts that ask for thinking")
    group.add_argument("--update_epochs", type=positive_int, default=1, help="passes over a rollout")
    group.add_argument("--mini_batches", type=positive_int, default=1, help="optimizer steps per pass")
    group.add_argument("--target_kl", type=nonneg_float, default=0.0,
                       help="drop the rest of a rollout, and sample the next, once the policy moved so far: KL in nats "
                            "per token (0: never); acts where a rollout has 3 steps or more")
    group.add_argument("--is_cap", type=nonneg_float, default=0.0,
                       help="truncated importance sampling against the sampler's rounding: the largest weight (0: off)")
    group.add_argument("--show_samples", type=nonneg_int, default=0,
                       help="print this many answers per rollout, coloured by the advantage of each token")
    group.add_argument("--show_interval", type=positive_int, default=1, help="rollouts between such prints")
    group.add_argument("--mini_batch_size", type=positive_int, help=argparse.SUPPRESS)  # sets mini_batches
    group.add_argument("--debug_mode", action="store_const", dest="show_samples", const=2, default=argparse.SUPPRESS,
                       help=argparse.SUPPRESS)
    parser.add_aliases(ppo_update_iters="update_epochs", early_stop_kl="target_kl", debug_interval="show_interval",
                       sglang_model_path="tokenizer", reasoning="thinking_ratio", num_workers=None,
                       debug_log_ratio=None, update_old_actor_freq=None)
    parser.set_defaults(**defaults)  # after the flags: argparse lets the default of a later flag win
    return parser


# Per loss: how far below and above 1 the ratio is clipped (cispo: the largest ratio), and the mean its paper takes.
POLICY_DEFAULTS = {"grpo": (0.2, 0.2, "sequence"), "gspo": (3e-4, 4e-4, "sequence"), "cispo": (0.0, 5.0, "token"),
                   "spo": (0.2, 0.28, "token")}


def policy_parser(description: str, **defaults) -> Parser:
    """The flags of an online RL stage without a critic."""
    parser = rl_parser(description, **defaults)
    group = parser.add_argument_group("loss")
    group.add_argument("--loss_type", choices=POLICY_DEFAULTS, default="cispo", help="spo: one answer per prompt")
    group.add_argument("--beta", type=nonneg_float, default=0.1,
                       help="coefficient of the KL to the reference model (0: no KL)")
    group.add_argument("--epsilon", type=nonneg_float, help="clip the ratio at 1 - this (default: of the loss)")
    group.add_argument("--epsilon_high", type=nonneg_float, help="clip the ratio at 1 + this; cispo: at this")
    group.add_argument("--aggregation", choices=("token", "sequence"),
                       help="mean over all tokens, or per answer first and then over answers (default: as published)")
    group.add_argument("--scale_rewards", **SWITCH, default=1, help="divide by the std of a prompt's rewards")
    group.add_argument("--resample", **SWITCH, default=0,
                       help="replace prompts whose answers all get the same reward (DAPO)")
    group.add_argument("--spo_half_life", type=nonneg_float, default=0.06,
                       help="spo: a prompt's past rewards count 2^(-KL per token / this), kept within 0.875 and 0.96")
    parser.set_defaults(**defaults)
    return parser


def parse_policy_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """As `parse_args`, with the defaults of the chosen loss."""
    args = parse_args(parser, argv)
    clip_low, clip_high, aggregation = POLICY_DEFAULTS[args.loss_type]
    args.epsilon = clip_low if args.epsilon is None else args.epsilon
    args.epsilon_high = clip_high if args.epsilon_high is None else args.epsilon_high
    args.aggregation = args.aggregation or aggregation
    if args.loss_type == "spo":
        args.num_generations = 1
        if not args.spo_half_life:
            parser.error("--spo_half_life 0 forgets everything at once; it must be above 0")
        if args.resample:
            parser.error("--resample compares the answers to one prompt, of which --loss_type spo has one")
    elif args.num_generations < 2:
        parser.error(f"--num_generations {args.num_generations}: an answer is compared with others; give 2 or more")
    return args


def policy_settings(args: argparse.Namespace) -> dict:
    """Flags of the loss that must be unchanged when a run is resumed."""
    return {name: getattr(args, name) for name in (
        "loss_type", "epsilon", "epsilon_high", "beta", "is_cap", "scale_rewards", "spo_half_life", "target_kl")}


# Flags, when they have an effect, and how to say so.
CONDITIONAL_FLAGS = (
    (("judge_model",), lambda args: args.judge_url, "--judge_url"),
    (("trust_remote_code",), lambda args: args.reward_model_path, "--reward_model_path"),
    (("rollout_url", "rollout_dir", "max_mismatch"), lambda args: args.rollout_engine != "local",
     "--rollout_engine sglang or vllm"),
    (("epsilon",), lambda args: args.loss_type != "cispo", "--loss_type grpo, gspo or spo"),
    (("spo_half_life",), lambda args: args.loss_type == "spo", "--loss_type spo"),
    (("scale_rewards",), lambda args: args.loss_type != "spo", "--loss_type grpo, gspo or cispo"),
    (("target_kl",), lambda args: args.mini_batch_size or args.update_epochs * args.mini_batches > 2,
     "--update_epochs x --mini_batches of 3 or more"),
    (("simpo_gamma",), lambda args: args.loss_type == "simpo", "--loss_type simpo"),
    (("from_teacher_weight", "teacher_hidden_size", "teacher_num_layers", "teacher_use_moe"),
     lambda args: args.teacher_load_from == "model", "--teacher_load_from model"),
)


def parse_args(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; paths become absolute, so that nothing depends on the current directory later."""
    sizes = ("batch_size", "accumulation_steps")
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(sizes)))  # None where a flag is not given
    if args.global_batch_size and args.accumulation_steps:
        notice("--accumulation_steps is not used: it follows from --global_batch_size")
    if args.deepspeed_config and args.parallel != "deepspeed":
        parser.error("--deepspeed_config is for --parallel deepspeed")
    for flags, has_effect, condition in CONDITIONAL_FLAGS:
        if hasattr(args, flags[0]) and not has_effect(args):
            parser.note_unused(args, flags, f"with {condition}")
    if (args.eval_interval or args.eval_first) and not args.val_data_path:
        notice("nothing is validated: --eval_interval and --eval_first need --val_data_path")
    args.adapt_batch = all(getattr(args, name) is None for name in sizes)  # to the size of the data
    for name in sizes:
        setattr(args, name, getattr(args, name) or parser.get_default(name))
    check_name(args.save_weight)
    args.tokenizer = TOKENIZER_DIR if args.tokenizer == "model" else args.tokenizer
    if getattr(args, "temperature", 1.0) == 0:
        parser.error("--temperature 0 leaves no distribution to learn from; it must be above 0")
    for name in ("data_path", "val_data_path", "cache_dir", "tokenizer", "save_dir", "checkpoint_dir",
                 "deepspeed_config"):
        value = getattr(args, name, None)
        if value == "":  # an unset variable of a shell
            parser.error(f"--{name} is empty")
        try:
            setattr(args, name, Path(value).expanduser().absolute() if value else None)
        except RuntimeError as error:  # the home of a user that there is not
            parser.error(f"--{name} {value}: {first_line(error)}")
    if args.use_moe is not None:
        args.use_moe = bool(args.use_moe)
    return args
