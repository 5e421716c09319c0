"""Distillation: learn from the whole distribution of a larger teacher, not only from the next token of the data."""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from torch import nn

from dataset.lm_dataset import SFTDataset
from model.cli import UserError, fraction, nonneg_float, positive_int, run_main
from model.transformers_io import load_folder
from model.weights import ROOT, find_weight, read_weight, tokenizer_of, weights_hash
from trainer.arguments import add_sft_args, parse_args, sft_options, stage_parser
from trainer.batches import BatchStream
from trainer.losses import distillation_loss
from trainer.run import Run
from trainer.trainer import Trainer


def load_teacher(run: Run) -> nn.Module:
    """The frozen teacher: a weight of ours or a transformers folder, of the student's vocabulary."""
    args, tokenizer = run.args, run.tokenizer
    if args.teacher_load_from == "model":
        path = find_weight(args.from_teacher_weight, args.save_dir, args.teacher_hidden_size,
                           bool(args.teacher_use_moe))
        tokenizer_of(path, args.tokenizer)  # raises an error when nothing says which it is
        run.sources.append(path)
        teacher, _ = read_weight(path, tokenizer)
        num_layers = teacher.config.num_hidden_layers
        if args.teacher_num_layers not in (None, num_layers):
            raise UserError(f"--teacher_num_layers {args.teacher_num_layers}, but weight {args.from_teacher_weight} "
                            f"has {num_layers}")
    else:
        teacher, its_tokenizer = load_folder(args.teacher_load_from)
        if its_tokenizer.token_bytes != tokenizer.token_bytes or teacher.config.vocab_size != tokenizer.vocab_size:
            raise UserError(f"--teacher_load_from {args.teacher_load_from}: not the vocabulary of the student; let it "
                            "write answers instead (scripts/generate_answers.py) and fine-tune on them")
    return run.freeze(teacher)


def main() -> None:
    parser = stage_parser(
        __doc__, data_path=str(ROOT / "dataset/sft_t2t_mini.jsonl"), from_weight="full_sft", save_weight="full_dist",
        max_seq_len=340, batch_size=32, learning_rate=5e-6, epochs=6, use_moe=0, wandb_project="MiniMind-Distillation")
    parser.add_aliases(student_hidden_size="hidden_size", student_num_layers="num_hidden_layers",
                       student_use_moe="use_moe", from_student_weight="from_weight")
    parser.add_argument("--from_teacher_weight", default="full_sft", help="weight of the teacher")
    parser.add_argument("--teacher_load_from", default="model", help="'model', or a transformers folder")
    parser.add_argument("--teacher_hidden_size", type=positive_int,
                        help="hidden size of the teacher, where several weights have its name")
    parser.add_argument("--teacher_num_layers", type=positive_int, help="number of layers the teacher must have")
    parser.add_argument("--teacher_use_moe", type=int, choices=(0, 1), default=1,
                        help="1: the teacher is a mixture of experts")
    parser.add_argument("--alpha", type=fraction, default=0.5,
                        help="weight of the data's own tokens in the loss; the teacher has the rest")
    parser.add_argument("--temperature", type=nonneg_float, default=1.5, help="softens both distributions")
    parser.add_argument("--reverse_kl", type=int, choices=(0, 1), default=0,
                        help="KL(student || teacher), which seeks a mode of the teacher's, instead of covering all")
    add_sft_args(parser)
    args = parse_args(parser)
    with Run(args) as run:
        student = run.load_model()  # before the teacher, so that the seed gives one student whatever the teacher
        teacher = load_teacher(run)
        if weights_hash(teacher) == weights_hash(student):
            raise UserError("the student is its own teacher; name another with --from_teacher_weight, "
                            "--teacher_hidden_size or --teacher_use_moe")
        data, val_data = run.load_datasets(SFTDataset, **sft_options(args))
        # Loss: α·(-log p(target)) + (1 - α)·T²·KL(teacher ‖ student) at temperature T, over the supervised tokens.
        loss = partial(distillation_loss, teacher=teacher, alpha=args.alpha, temperature=args.temperature,
                       reverse=bool(args.reverse_kl))
        settings = {name: getattr(args, name) for name in ("alpha", "temperature", "reverse_kl")}
        Trainer(run, student, BatchStream(data, args, run.world), loss, val_data,
                settings={"from_teacher_weight": weights_hash(teacher), **settings}).fit()


if __name__ == "__main__":
    run_main(main)
