"""What a model of any size would need: parameters, memory per rank, tokens/s; what the published recipe would cost.

    python benchmarks/dry_run.py --hidden_size 2048 --num_hidden_layers 20 --num_attention_heads 16 \\
                                 --num_key_value_heads 8 --ranks 8                    # 1 B on 8 GPUs, computed
    python benchmarks/dry_run.py --check        # the same formulas for 64 M on this machine, beside what is measured
    python benchmarks/dry_run.py --cost         # stage x model: hours and yuan on one RTX 3090, computed

Nothing is allocated for the prediction: shapes come from the meta device, formulas from docs/scaling.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
from torch import nn

from benchmarks.machine import save_result, train
from model.cli import Parser, UserError, fraction, nonneg_float, num_positions, positive_float, positive_int, run_main
from model.loading import add_model_args
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import ROOT
from trainer import train_pretrain
from trainer.flops import flops_per_token
from trainer.parallel import DDPStrategy
from trainer.run import MODEL_SIZES
from trainer.trainer import STRATEGIES
from trainer.zero import MOMENTS, DeepSpeedStrategy

# bytes of weights, gradients and moments that a rank holds, for P parameters on N ranks (fp32, AdamW)
STATE = {"ddp": lambda P, N: (4 * P, 4 * P, 8 * P),
         "zero1": lambda P, N: (4 * P + 4 * P / N, 4 * P, 8 * P / N),
         "zero2": lambda P, N: (4 * P + 4 * P / N, 4 * P / N, 8 * P / N),
         "zero3": lambda P, N: (8 * P / N, 4 * P / N, 8 * P / N),
         "fsdp": lambda P, N: (4 * P / N, 4 * P / N, 8 * P / N)}
NUM_BUCKETS = {"zero1": 1, "zero2": 2, "zero3": 1}  # in which DeepSpeed gathers gradients before it sends them
BYTES_PER_TOKEN = 3.3  # of our tokenizer: 3.39 Chinese, 3.25 English (docs/results.md)
MOE_TIME = 1.4  # per token against dense: the published hours, 3.23 / 2.31
SHARED_PROMPT = 1.42  # a pair's prompt is computed once: so many times fewer positions, measured (docs/experiments.md)
# bytes of the published files, and the passes of an epoch over them; DPO: and one of the reference
STAGES = {"pretrain, mini": (1.2e9, 1), "SFT, mini": (1.6e9, 1), "pretrain, long": (10e9, 1), "SFT, long": (14e9, 1),
          "DPO": (53e6, (1 + 1 / 3) / SHARED_PROMPT), "reward model": (53e6, 1 / SHARED_PROMPT)}
NOT_COMPUTED = ("RLAIF (PPO, GRPO)", "tool calls (agent)")  # how fast the card decodes is not known here


def meta_model(**sizes) -> MiniMindForCausalLM:
    """A model without weights."""
    with torch.device("meta"):
        return MiniMindForCausalLM(MiniMindConfig(**sizes))


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def activation_bytes(config: MiniMindConfig, num_tokens: int, width: int) -> float:
    """What a micro-batch keeps for the backward pass: blocks, and fp32 logits with their gradient."""
    per_layer = 34 * config.hidden_size + 4 * config.intermediate_size  # of a token, at 2 bytes per number
    return num_tokens * (config.num_hidden_layers * per_layer * width / 2 + 8 * config.vocab_size)


def bucket_size(name: str) -> int:
    """Numbers in a bucket, as the strategy's configuration says."""
    config = json.loads((ROOT / f"trainer/deepspeed/{name}.json").read_text("utf-8"))
    return config["zero_optimization"]["reduce_bucket_size"]


def predict(model: MiniMindForCausalLM, args: argparse.Namespace) -> list[dict]:
    """For each strategy: GB per rank, and tokens/s of all ranks together."""
    P, config, N = num_parameters(model), model.config, args.ranks
    num_tokens = args.batch_size * args.max_seq_len
    block, embedding = num_parameters(model.model.layers[0]), config.vocab_size * config.hidden_size
    compute_seconds = num_tokens * flops_per_token(model, args.max_seq_len / 2) / (args.tflops * 1e12 * args.mfu)
    predictions = []
    for name, state in STATE.items():
        gathered = (3 * block + embedding) * args.width if name in ("zero3", "fsdp") else 0
        buckets = NUM_BUCKETS[name] * 4 * bucket_size(name) if name in NUM_BUCKETS else 0
        memory = (sum(state(P, N)) + gathered + buckets + activation_bytes(config, num_tokens, args.width)) / 1e9
        sent = 8 * P * (N - 1) / N * (1 if name != "zero3" else 1.5)  # bytes, in a step of one micro-batch
        send_seconds = sent / (args.link * 1e9)
        predictions.append({"strategy": name, "memory_gb": memory, "computing_s": compute_seconds,
                            "sending_s": send_seconds,
                            "tokens_per_s": N * num_tokens / max(compute_seconds, send_seconds)})
    return predictions


# -- the check ---------------------------------------------------------------------------------------------------------


def local_bytes(tensors: Iterable) -> int:
    """Of the parts of them that this rank holds."""
    return sum(getattr(x, "ds_tensor", x.to_local() if hasattr(x, "to_local") else x).nbytes for x in tensors)


def measure_state(strategy: DDPStrategy) -> dict[str, int]:
    """Bytes that this rank holds between the backward pass and the update, counted from the live tensors."""
    weights = list(strategy.model.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    moments = [x for optimizer in strategy.optimizers for state in optimizer.state.values()
               for key, x in state.items() if key in MOMENTS]
    if isinstance(strategy, DeepSpeedStrategy):  # steps a flat copy, and has gradients of its own from stage 2 on
        zero = strategy.wrapped.optimizer
        if strategy.stage == 3:
            weights, gradients = weights + zero.fp32_partitioned_groups_flat, [zero.grad_partitions_flat_buffer]
        else:
            weights = weights + list(zero.single_partition_of_fp32_groups)
            gradients += [x for group in zero.all_grad_tensors.values() for x in group or ()]
    return {"weights": local_bytes(weights), "gradients": local_bytes(gradients), "moments": local_bytes(moments)}


def train_and_measure(target: Path, flags: list[str]) -> None:
    """Run in every rank: train, and write what the first rank held before the last update to `target`."""
    def measured(optimizer_step: Callable) -> Callable:
        def step(strategy: DDPStrategy) -> None:
            if strategy.run.world.main:
                target.write_text(json.dumps(measure_state(strategy)))
            optimizer_step(strategy)
        return step

    with mock.patch.object(DDPStrategy, "optimizer_step", measured(DDPStrategy.optimizer_step)), \
            mock.patch.object(DeepSpeedStrategy, "optimizer_step", measured(DeepSpeedStrategy.optimizer_step)), \
            mock.patch.object(sys, "argv", ["train_pretrain.py", *flags]):
        train_pretrain.main()


def check(args: argparse.Namespace) -> dict:
    """64 M here: state and speed of two ranks by every strategy, memory and speed of one process."""
    result, P = {"ranks": 2, "state": {}, "tokens_per_s": {}, "runs": {}}, num_parameters(meta_model())
    with tempfile.TemporaryDirectory() as folder:
        data, target = Path(folder, "rows.jsonl"), Path(folder, "state.json")
        data.write_text("".join(json.dumps({"text": f"{n} " + "the sea is wide and deep, 天空很高。" * 40}) + "\n"
                                for n in range(200)))
        common = {"data_path": data, "cache_dir": folder, "accumulation_steps": 1, "batch_size": args.batch_size,
                  "max_seq_len": args.max_seq_len}
        two_ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__,
                     f"--measure={target}", "--"]
        for strategy in STATE:
            flags = {"parallel": strategy} if strategy in STRATEGIES else {
                "parallel": "deepspeed", "deepspeed_config": ROOT / f"trainer/deepspeed/{strategy}.json"}
            log, _ = train(two_ranks, {**common, **flags, "max_steps": 4, "log_interval": 2}, Path(folder, strategy))
            measured, predicted = json.loads(target.read_text()), STATE[strategy](P, 2)
            result["state"][strategy] = {part: {"predicted_gb": size / 1e9, "measured_gb": measured[part] / 1e9}
                                         for part, size in zip(measured, predicted, strict=True)}
            result["tokens_per_s"][strategy] = log[-1]["tokens_per_s"]
            print(f"{strategy:6}", *(f"{part} {gb['measured_gb']:.4f} ({gb['predicted_gb']:.4f}) GB"
                                     for part, gb in result["state"][strategy].items()),
                  f"{log[-1]['tokens_per_s']} tokens/s", flush=True)
        for name, sizes in {"30 M": {"hidden_size": 512}, "64 M": {}}.items():
            log, _ = train([ROOT / "trainer/train_pretrain.py"], {**common, **sizes, "max_steps": 6, "log_interval": 3},
                           Path(folder, name))
            model = meta_model(**sizes)
            activations = activation_bytes(model.config, args.batch_size * args.max_seq_len, 4)
            result["runs"][name] = {
                **{key: log[-1][key] for key in ("tokens_per_s", "mfu", "memory_gb")},
                "predicted_gb": (16 * num_parameters(model) + activations) / 1e9,
                "flops_per_token": flops_per_token(model, args.max_seq_len / 2)}
    small, large = result["runs"].values()
    large["predicted_tokens_per_s"] = small["tokens_per_s"] * small["flops_per_token"] / large["flops_per_token"]
    result["more_memory_than_the_small_gb"] = {"predicted": large["predicted_gb"] - small["predicted_gb"],
                                               "measured": large["memory_gb"] - small["memory_gb"]}
    return result


# -- the table of costs ------------------------------------------------------------------------------------------------


def cost_table(args: argparse.Namespace) -> str:
    """Hours and yuan of one and of two epochs: bytes / BYTES_PER_TOKEN x passes x FLOP per token / (TFLOP/s x MFU)

    … x MOE_TIME for MoE.
    """
    models = {"64 M dense": meta_model(), "198 M-A64 M MoE": meta_model(use_moe=True)}
    columns = [f"{name}, {epochs}" for name in models for epochs in ("1 epoch", "2 epochs")]
    lines = [f"| stage (computed) | tokens | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for stage, (num_bytes, passes) in STAGES.items():
        num_tokens, cells = num_bytes / BYTES_PER_TOKEN, []
        for model in models.values():
            flops = num_tokens * passes * flops_per_token(model, 170 if "pretrain" in stage else 384)
            hours = flops / (args.tflops * 1e12 * args.mfu) / 3600 * (MOE_TIME if model.config.use_moe else 1)
            cells += [f"{n * hours:.2f} h, {n * hours * args.price_per_hour:.2f} yuan" for n in (1, 2)]
        lines.append(f"| {stage} | {num_tokens / 1e6:,.0f} M x {passes:.3g} | {' | '.join(cells)} |")
    lines += [f"| {stage} |{' | not measured' * len(columns)} |".replace("||", "| |") for stage in NOT_COMPUTED]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(parser)
    parser.add_argument("--ranks", type=positive_int, default=8, help="processes, one GPU each (default: 8)")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows per rank and step (default: 8)")
    parser.add_argument("--max_seq_len", type=num_positions, default=340, help="tokens in a row (default: 340)")
    parser.add_argument("--tflops", type=positive_float, default=71, help="of a rank in bf16 (default: a 3090's 71)")
    parser.add_argument("--mfu", type=fraction, default=0.4, help="share of them that training reaches (assumed: 0.4)")
    parser.add_argument("--link", type=positive_float, default=300, help="GB/s between ranks (default: NVLink's 300)")
    parser.add_argument("--width", type=int, choices=(2, 4), default=2, help="bytes of an activation")
    parser.add_argument("--price_per_hour", type=nonneg_float, default=1.3, help="yuan (default: 1.3)")
    parser.add_argument("--check", action="store_true", help="measure 64 M on this machine beside the formulas")
    parser.add_argument("--cost", action="store_true", help="the table of costs")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # be a rank, write there what it holds,
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)  # and train with these flags, after --
    args = parser.parse_args()
    if not args.mfu:
        parser.error("--mfu 0: nothing would ever be done; give more than 0")
    if args.measure:
        return train_and_measure(args.measure, args.flags)
    if args.check:
        result = check(args)
        print(json.dumps(result, indent=1))
        return save_result("dry_run_check", result)
    if args.cost:
        return print(cost_table(args))
    try:
        model = meta_model(**{name: value for name in MODEL_SIZES if (value := getattr(args, name)) is not None})
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"{num_parameters(model) / 1e6:,.1f} M parameters, "
          f"{flops_per_token(model, args.max_seq_len / 2) / 1e9:.2f} GFLOP per token; {args.ranks} ranks of "
          f"{args.tflops:g} TFLOP/s at MFU {args.mfu:.0%} (assumed), {args.batch_size} x {args.max_seq_len} tokens "
          f"each, {args.link:g} GB/s between them\n")
    print("| strategy (computed) | GB per rank | computing | sending | tokens/s |\n|---|---|---|---|---|")
    for row in predict(model, args):
        print(f"| {row['strategy']} | {row['memory_gb']:.2f} | {1e3 * row['computing_s']:.0f} ms | "
              f"{1e3 * row['sending_s']:.0f} ms | {row['tokens_per_s']:,.0f} |")


if __name__ == "__main__":
    run_main(main)
