"""LoRA: fine-tune low-rank adapters beside a frozen model, on conversations; only the adapters are saved."""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from dataset.lm_dataset import SFTDataset
from model.cli import fraction, nonneg_float, positive_int, run_main
from model.model_lora import TARGETS, LoRAConfig, apply_lora, find_target_modules, save_lora
from model.weights import ROOT, weights_hash
from trainer.arguments import add_sft_args, parse_args, sft_options, stage_parser
from trainer.batches import BatchStream
from trainer.losses import next_token_loss
from trainer.run import Run
from trainer.trainer import Trainer


def main() -> None:
    parser = stage_parser(
        __doc__, from_weight="full_sft", save_weight="lora_medical", max_seq_len=340, batch_size=32,
        learning_rate=1e-4, epochs=10, wandb_project="MiniMind-LoRA")
    parser.add_argument("--lora_name", dest="save_weight",
                        help="name of the LoRA to write, and of its data in dataset/ unless --data_path is given")
    parser.add_argument("--lora_rank", type=positive_int, default=LoRAConfig.rank, help="rank of the adapters")
    parser.add_argument("--lora_alpha", type=nonneg_float, default=16.0,
                        help="the adapter's output is scaled by alpha / rank")
    parser.add_argument("--lora_dropout", type=fraction, default=LoRAConfig.dropout,
                        help="dropout probability on the input of the adapters")
    parser.add_argument("--lora_targets", default="all",
                        help=f"names of layers, with commas between; all: what the model has of {', '.join(TARGETS)}")
    add_sft_args(parser)
    args = parse_args(parser)
    args.data_path = args.data_path or ROOT / f"dataset/{args.save_weight}.jsonl"
    with Run(args) as run:
        model = run.load_model()
        there = [name for name in TARGETS if name in find_target_modules(model)]
        targets = there if args.lora_targets == "all" else args.lora_targets.split(",")
        lora = LoRAConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, tuple(targets), weights_hash(model))
        apply_lora(model, lora)
        train_data, val_data = run.load_datasets(SFTDataset, **sft_options(args))
        stream = BatchStream(train_data, args, run.world)
        Trainer(run, model, stream, next_token_loss, val_data, save_fn=partial(save_lora, lora=lora),
                settings={"from_weight": lora.base, "lora_rank": lora.rank, "lora_alpha": lora.alpha,
                          "lora_dropout": lora.dropout, "lora_targets": ",".join(lora.targets)}).fit()


if __name__ == "__main__":
    run_main(main)
