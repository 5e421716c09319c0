"""Pretraining: predict the next token of plain text, from random weights."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from dataset.lm_dataset import PretrainDataset
from model.cli import run_main
from model.weights import ROOT
from trainer.arguments import parse_args, stage_parser
from trainer.batches import BatchStream
from trainer.losses import next_token_loss
from trainer.run import Run
from trainer.trainer import Trainer


def main() -> None:
    args = parse_args(stage_parser(
        __doc__, data_path=str(ROOT / "dataset/pretrain_t2t_mini.jsonl"), from_weight="none", save_weight="pretrain",
        max_seq_len=340, batch_size=32, accumulation_steps=8, learning_rate=5e-4, wandb_project="MiniMind-Pretrain"))
    with Run(args) as run:
        model = run.load_model()
        train_data, val_data = run.load_datasets(PretrainDataset)
        Trainer(run, model, BatchStream(train_data, args, run.world), next_token_loss, val_data).fit()


if __name__ == "__main__":
    run_main(main)
