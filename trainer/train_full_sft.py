"""Full supervised fine-tuning: learn to answer from conversations; the loss covers only what the assistant writes."""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from dataset.lm_dataset import SFTDataset
from model.cli import nonneg_float, run_main
from model.weights import ROOT
from trainer.arguments import add_sft_args, parse_args, sft_options, stage_parser
from trainer.batches import BatchStream
from trainer.losses import next_token_loss
from trainer.run import Run
from trainer.trainer import Trainer


def main() -> None:
    parser = stage_parser(
        __doc__, data_path=str(ROOT / "dataset/sft_t2t_mini.jsonl"), from_weight="pretrain", save_weight="full_sft",
        max_seq_len=768, batch_size=16, accumulation_steps=1, learning_rate=1e-5, wandb_project="MiniMind-Full-SFT")
    add_sft_args(parser)
    parser.add_argument("--tag_loss_weight", type=nonneg_float, default=1.0,
                        help="weight of think and tool tags in the loss; other tokens have weight 1")
    args = parse_args(parser)
    with Run(args) as run:
        model = run.load_model()
        train_data, val_data = run.load_datasets(SFTDataset, **sft_options(args))
        loss_fn = next_token_loss if args.tag_loss_weight == 1 else partial(
            next_token_loss, tag_weight=args.tag_loss_weight)
        stream = BatchStream(train_data, args, run.world)
        Trainer(run, model, stream, loss_fn, val_data, settings={"tag_loss_weight": args.tag_loss_weight}).fit()


if __name__ == "__main__":
    run_main(main)
