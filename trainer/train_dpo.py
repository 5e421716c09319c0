"""DPO: prefer the chosen answer to the rejected one, and stay near the reference, from which training starts."""

import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import numpy as np
import torch
from torch import nn

from dataset.lm_dataset import DPODataset
from model.cli import UserError, fraction, nonneg_float, run_main
from model.files import open_atomically
from model.weights import ROOT, weights_hash
from trainer.arguments import parse_args, stage_parser
from trainer.batches import BatchStream, to_device
from trainer.losses import PREFERENCE_LOSSES, answer_log_probs, dpo_loss
from trainer.run import Run
from trainer.trainer import Trainer


@torch.no_grad()
def reference_log_probs(run: Run, model: nn.Module, base: str, data: DPODataset) -> torch.Tensor:
    """log p of every answer under `model`, [documents] in the order of the rows; computed once, cached beside `data`.

    In the same precision and the same (compiled) blocks as the policy is trained, so that their ratio starts at 1.
    """
    name = f"{data.row_index_path.stem}_{base}_{run.device.type}_{str(run.dtype)[6:]}.pt"
    path, world, B = data.row_index_path.with_name(name), run.world, run.args.batch_size
    if world.any(not path.exists()):
        run.prepare(model)
        start, by_row = time.perf_counter(), {}
        for begin in range(world.rank * B, len(data), world.size * B):
            rows = np.arange(begin, begin + B)
            rows[rows >= len(data)] = -1
            with run.autocast():
                by_row[begin] = answer_log_probs(model, to_device(data.batch(rows), run.device))[0].cpu()
        by_row = {begin: part for rank in world.gather(by_row) for begin, part in rank.items()}
        if world.local_rank == 0:
            with open_atomically(path) as file:
                torch.save(torch.cat([by_row[begin] for begin in sorted(by_row)]), file)
        world.gather(None)  # the other ranks wait until it is written
        seconds = time.perf_counter() - start
        run.print_main(f"reference: {int(data.num_tokens.sum()):,} tokens of {data.path.name} in {seconds:.1f} s")
    return torch.load(path, weights_only=True)


def main() -> None:
    parser = stage_parser(
        __doc__, data_path=str(ROOT / "dataset/dpo.jsonl"), from_weight="full_sft", save_weight="dpo",
        max_seq_len=1024, batch_size=4, learning_rate=4e-8, epochs=1, wandb_project="MiniMind-DPO")
    parser.add_argument("--beta", type=nonneg_float, default=0.15,
                        help="scale of the log-ratios (simpo: 2 or more)")
    parser.add_argument("--loss_type", choices=PREFERENCE_LOSSES, default="sigmoid",
                        help="simpo: on length-normalised log-probabilities, without a reference")
    parser.add_argument("--label_smoothing", type=fraction, default=0.0, help="assumed fraction of mislabelled pairs")
    parser.add_argument("--simpo_gamma", type=nonneg_float, default=0.5, help="target reward margin of simpo")
    args = parse_args(parser)
    if not args.beta:
        raise UserError("--beta 0 learns nothing; give more than 0")
    if args.label_smoothing and args.loss_type == "ipo":
        raise UserError("--label_smoothing is not defined for --loss_type ipo; leave it out")
    with Run(args) as run:
        model = run.load_model()
        base = weights_hash(model)
        # 1. Pairs: a chosen and a rejected answer to one prompt.
        data, val_data = run.load_datasets(DPODataset)
        # 2. Reference log-probabilities: log π_ref(y | x) of both answers, before the first step.
        for dataset in filter(None, (data, val_data) if args.loss_type != "simpo" else ()):
            dataset.ref_logprobs = reference_log_probs(run, model, base, dataset)
        # 3. Loss: -log σ(β·(log π_θ/π_ref (chosen) - log π_θ/π_ref (rejected))), or another --loss_type.
        loss = partial(dpo_loss, loss_type=args.loss_type, beta=args.beta, label_smoothing=args.label_smoothing,
                       gamma=args.simpo_gamma)
        names = ("loss_type", "beta", "label_smoothing", "simpo_gamma")
        Trainer(run, model, BatchStream(data, args, run.world), loss, val_data, val_loss_fn=loss,
                settings={"from_weight": base, **{name: getattr(args, name) for name in names}}).fit()


if __name__ == "__main__":
    run_main(main)
