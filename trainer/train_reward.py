"""A reward model: one number for a conversation, higher for the answers people chose (Bradley-Terry on DPO's rows)."""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from dataset.lm_dataset import DPODataset
from model.cli import UserError, nonneg_float, nonneg_int, run_main
from model.model_reward import MiniMindForSequenceClassification
from model.transformers_io import save_folder
from model.weights import ROOT, file_stem, weights_hash
from trainer.arguments import parse_args, stage_parser
from trainer.batches import BatchStream
from trainer.losses import reward_loss
from trainer.run import Run
from trainer.trainer import Trainer


def main() -> None:
    parser = stage_parser(
        __doc__, data_path=str(ROOT / "dataset/dpo.jsonl"), from_weight="full_sft", save_weight="reward",
        max_seq_len=1024, batch_size=4, learning_rate=1e-5, epochs=1, wandb_project="MiniMind-Reward")
    parser.add_argument("--extra_layers", type=nonneg_int, default=0,
                        help="layers to add on top, initialised as copies of the first ones")
    parser.add_argument("--token_weight", type=nonneg_float, default=0.0,
                        help="weight of the same loss on the sum of an answer's per-token rewards")
    args = parse_args(parser)
    with Run(args) as run:
        decoder = run.load_model()
        model = MiniMindForSequenceClassification.from_decoder(decoder, args.extra_layers)
        folder = args.save_dir / file_stem(args.save_weight, model.config)
        config = folder / "config.json"
        if config.exists() and "SequenceClassification" not in config.read_text("utf-8"):
            raise UserError(f"--save_weight {args.save_weight}: {folder} holds another model, which the reward model "
                            "would replace; name another weight to write")
        data, val_data = run.load_datasets(DPODataset)
        # Loss: -log σ(r(chosen) - r(rejected)).
        loss = partial(reward_loss, token_weight=args.token_weight)
        settings = {"from_weight": weights_hash(decoder), "extra_layers": args.extra_layers,
                    "token_weight": args.token_weight}
        trainer = Trainer(run, model, BatchStream(data, args, run.world), loss, val_data, val_loss_fn=reward_loss,
                          settings=settings)
        trainer.fit()
        trained = trainer.strategy.gather_full_model()
        if run.world.main:
            save_folder(trained, folder, run.tokenizer, "SequenceClassification", num_labels=1)
            run.print_main(f"train: {folder} opens with transformers' AutoModelForSequenceClassification")


if __name__ == "__main__":
    run_main(main)
