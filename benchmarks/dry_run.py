"""What a model of any size would need: parameters, memory of a rank, tokens/s; what the published recipe would cost.

    python benchmarks/dry_run.py --hidden_size 2048 --num_hidden_layers 20 --num_attention_heads 16 \\
                                 --num_key_value_heads 8 --ranks 8                    # 1 B on 8 GPUs, computed
    python benchmarks/dry_run.py --check        # the same formulas for 64 M on this machine, beside what is measured
    python benchmarks/dry_run.py --cost         # stage x model: hours and yuan on one RTX 3090, computed

Nothing is allocated for the prediction: shapes come from the meta device, formulas from docs/scaling.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch

from benchmarks.machine import save_result
from model.cli import Parser, UserError, fraction, nonneg_float, positive_int, run_main
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
BUCKETS = {"zero1": 1, "zero2": 2, "zero3": 1}  # in which DeepSpeed gathers gradients before it sends them
BYTES_PER_TOKEN = 3.3  # of our tokenizer: 3.39 Chinese, 3.25 English (docs/results.md)
MOE_TIME = 1.4  # of a token against dense: the published hours, 3.23 / 2.31
PROMPTS = 1.42  # of a pair is computed once: so many times fewer positions, measured (docs/experiments.md)
# bytes of the published files, and how often the recipe goes over them
STAGES = {"pretrain, mini": (1.2e9, 2), "SFT, mini": (1.6e9, 2), "pretrain, long": (10e9, 2), "SFT, long": (14e9, 2),
          "DPO": (53e6, (1 + 1 / 3) / PROMPTS), "reward model": (53e6, 1 / PROMPTS)}  # DPO: and a pass of the reference


def outline(**sizes) -> MiniMindForCausalLM:
    """A model without weights."""
    with torch.device("meta"):
        return MiniMindForCausalLM(MiniMindConfig(**sizes))


def activations(config: MiniMindConfig, tokens: int, width: int) -> float:
    """Bytes that a micro-batch keeps for the backward pass: blocks, and fp32 logits with their gradient."""
    one = 34 * config.hidden_size + 4 * config.intermediate_size  # of a token in a layer, at 2 bytes a number
    return tokens * (config.num_hidden_layers * one * width / 2 + 8 * config.vocab_size)


def bucket_size(name: str) -> int:
    """Numbers in a bucket, as the strategy's configuration says."""
    config = json.loads((ROOT / f"trainer/deepspeed/{name}.json").read_text("utf-8"))
    return config["zero_optimization"]["reduce_bucket_size"]


def predict(model: MiniMindForCausalLM, args: argparse.Namespace) -> list[dict]:
    """Each strategy's GB of a rank and tokens/s of all ranks together."""
    P, config, N = sum(p.numel() for p in model.parameters()), model.config, args.ranks
    tokens = args.batch_size * args.max_seq_len
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    embedding, found = config.vocab_size * config.hidden_size, []
    computing = tokens * flops_per_token(model, args.max_seq_len / 2) / (args.tflops * 1e12 * args.mfu)
    for name, state in STATE.items():
        gathered = (3 * block + embedding) * args.width if name in ("zero3", "fsdp") else 0
        buckets = BUCKETS[name] * 4 * bucket_size(name) if name in BUCKETS else 0
        memory = (sum(state(P, N)) + gathered + buckets + activations(config, tokens, args.width)) / 1e9
        sent = 8 * P * (N - 1) / N * (1 if name != "zero3" else 1.5)  # of a step of one micro-batch
        sending = sent / (args.link * 1e9)
        found.append({"strategy": name, "memory_gb": memory, "computing_s": computing, "sending_s": sending,
                      "tokens_per_s": N * tokens / max(computing, sending)})
    return found


# -- the check ---------------------------------------------------------------------------------------------------------


def bytes_of(tensors: Iterable) -> int:
    """Of what this rank has of them."""
    return sum(getattr(x, "ds_tensor", x.to_local() if hasattr(x, "to_local") else x).nbytes for x in tensors)


def held(strategy: DDPStrategy) -> dict[str, int]:
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
    return {part: bytes_of(of) for part, of in
            {"weights": weights, "gradients": gradients, "moments": moments}.items()}


def hold(target: Path, flags: list[str]) -> None:
    """Run in every rank: train, and write what this rank held before the last update."""
    def watched(optimizer_step: Callable) -> Callable:
        def measured(strategy):
            if strategy.run.world.main:
                target.write_text(json.dumps(held(strategy)))
            optimizer_step(strategy)
        return measured

    with mock.patch.object(DDPStrategy, "optimizer_step", watched(DDPStrategy.optimizer_step)), \
            mock.patch.object(DeepSpeedStrategy, "optimizer_step", watched(DeepSpeedStrategy.optimizer_step)), \
            mock.patch.object(sys, "argv", ["train_pretrain.py", *flags]):
        train_pretrain.main()


def check(args: argparse.Namespace) -> dict:
    """64 M here: state and speed of two ranks by every strategy, memory and speed of one process."""
    found = {"ranks": 2, "state": {}, "tokens_per_s": {}, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("".join(json.dumps({"text": f"{n} " + "the sea is wide and deep, 天空很高。" * 40}) + "\n"
                                for n in range(200)))
        common = [f"--data_path={rows}", f"--save_dir={folder}", f"--checkpoint_dir={folder}", f"--cache_dir={folder}",
                  "--accumulation_steps=1", f"--batch_size={args.batch_size}", f"--max_seq_len={args.max_seq_len}"]
        P = sum(p.numel() for p in outline().parameters())
        for strategy in STATE:
            target, place = Path(folder, f"{strategy}.json"), Path(folder, strategy)
            how = [f"--parallel={strategy}"] if strategy in STRATEGIES else \
                ["--parallel=deepspeed", f"--deepspeed_config={ROOT / 'trainer/deepspeed' / strategy}.json"]
            subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                            __file__, f"--hold={target}", "--", *common, *how, f"--save_dir={place}", "--max_steps=4",
                            "--log_interval=2"], check=True, stdout=subprocess.DEVNULL)
            counted, wanted = json.loads(target.read_text()), STATE[strategy](P, 2)
            found["state"][strategy] = {part: {"predicted_gb": size / 1e9, "measured_gb": counted[part] / 1e9}
                                        for part, size in zip(counted, wanted, strict=True)}
            log, = Path(place, "logs").glob("*.jsonl")
            found["tokens_per_s"][strategy] = json.loads(log.read_text().splitlines()[-1])["tokens_per_s"]
            print(f"{strategy:6}", *(f"{part} {gb['measured_gb']:.4f} ({gb['predicted_gb']:.4f}) GB" for part, gb in
                                     found["state"][strategy].items()), found["tokens_per_s"][strategy], "tokens/s",
                  flush=True)
        for name, sizes in {"30 M": {"hidden_size": 512}, "64 M": {}}.items():
            subprocess.run([sys.executable, ROOT / "trainer/train_pretrain.py", *common, "--max_steps=6",
                            "--log_interval=3", *(f"--{key}={value}" for key, value in sizes.items())], check=True,
                           stdout=subprocess.DEVNULL)
            log, model = Path(folder, "logs", f"pretrain_{sizes.get('hidden_size', 768)}.jsonl"), outline(**sizes)
            row, P = json.loads(log.read_text().splitlines()[-1]), sum(p.numel() for p in model.parameters())
            tokens = args.batch_size * args.max_seq_len
            found["runs"][name] = {
                "tokens_per_s": row["tokens_per_s"], "mfu": row["mfu"], "memory_gb": row["memory_gb"],
                "predicted_gb": (16 * P + activations(model.config, tokens, 4)) / 1e9,
                "flops_per_token": flops_per_token(model, args.max_seq_len / 2)}
    small, large = found["runs"].values()
    large["predicted_tokens_per_s"] = small["tokens_per_s"] * small["flops_per_token"] / large["flops_per_token"]
    found["more_memory_than_the_small_gb"] = {"predicted": large["predicted_gb"] - small["predicted_gb"],
                                              "measured": large["memory_gb"] - small["memory_gb"]}
    return found


# -- the table of costs ------------------------------------------------------------------------------------------------


def cost_table(args: argparse.Namespace) -> str:
    """Hours and yuan of each stage: bytes / BYTES_PER_TOKEN x passes x FLOP a token / (TFLOP/s x MFU)

    … x MOE_TIME. RL is left out: how fast the card decodes is not known here.
    """
    models = {"64 M dense": outline(), "198 M-A64 M MoE": outline(use_moe=True)}
    lines = [f"| stage (computed) | tokens | {' | '.join(models)} |", "|---" * (len(models) + 2) + "|"]
    for stage, (size, passes) in STAGES.items():
        tokens, cells = size / BYTES_PER_TOKEN, []
        for model in models.values():
            work = tokens * passes * flops_per_token(model, 170 if "pretrain" in stage else 384)
            hours = work / (args.tflops * 1e12 * args.mfu) / 3600 * (MOE_TIME if model.config.use_moe else 1)
            cells.append(f"{hours:.2f} h, {hours * args.price_per_hour:.2f} yuan")
        lines.append(f"| {stage} | {tokens / 1e6:,.0f} M x {passes:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(parser)
    parser.add_argument("--ranks", type=positive_int, default=8, help="processes, one GPU each (default: 8)")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="rows a rank takes at a time (default: 8)")
    parser.add_argument("--max_seq_len", type=positive_int, default=340, help="tokens in a row (default: 340)")
    parser.add_argument("--tflops", type=nonneg_float, default=71,
                        help="of a rank's products, bf16 (default: a 3090's 71)")
    parser.add_argument("--mfu", type=fraction, default=0.4, help="share of them that training reaches (assumed: 0.4)")
    parser.add_argument("--link", type=nonneg_float, default=300, help="GB/s between ranks (default: NVLink's 300)")
    parser.add_argument("--width", type=int, choices=(2, 4), default=2, help="bytes of an activation")
    parser.add_argument("--price_per_hour", type=nonneg_float, default=1.3, help="yuan (default: 1.3)")
    parser.add_argument("--check", action="store_true", help="measure 64 M on this machine beside the formulas")
    parser.add_argument("--cost", action="store_true", help="the table of costs")
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)  # be a rank that writes there what it holds,
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)  # and trains with these flags, after --
    args = parser.parse_args()
    if args.hold:
        return hold(args.hold, args.flags)
    if args.check:
        found = check(args)
        print(json.dumps(found, indent=1))
        return save_result("dry_run_check", found)
    if args.cost:
        return print(cost_table(args))
    try:
        model = outline(**{name: value for name in MODEL_SIZES if (value := getattr(args, name)) is not None})
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters, "
          f"{flops_per_token(model, args.max_seq_len / 2) / 1e9:.2f} GFLOP a token; {args.ranks} ranks of "
          f"{args.tflops:g} TFLOP/s at MFU {args.mfu:.0%} (assumed), {args.batch_size} x {args.max_seq_len} tokens "
          f"each, {args.link:g} GB/s between them\n")
    print("| strategy (computed) | GB a rank | computing | sending | tokens/s |\n|---|---|---|---|---|")
    for row in predict(model, args):
        print(f"| {row['strategy']} | {row['memory_gb']:.2f} | {1e3 * row['computing_s']:.0f} ms | "
              f"{1e3 * row['sending_s']:.0f} ms | {row['tokens_per_s']:,.0f} |")


if __name__ == "__main__":
    run_main(main)
