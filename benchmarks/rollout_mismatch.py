"""How far the log-probabilities of rollouts in half precision are from those of the policy in fp32.

That much is rounding: the bounds of online RL (trainer/rl/rollouts.py, --max_mismatch) are above it. Our engine samples
answers in each dtype, the same weights score them in fp32: the mean over sampled tokens of |log p - log p'|, in nats.

    python benchmarks/rollout_mismatch.py                                   # random weights, dense and MoE
    python benchmarks/rollout_mismatch.py --weight out/full_sft_128.pth     # and trained ones
"""

import argparse
import copy
import random
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch

from benchmarks.machine import random_prompt, save_result
from model.cli import Parser, positive_int, run_main
from model.inference.engine import Engine
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import read_weight
from trainer.rollout_engine import policy_sampling_params

TEMPERATURES = (1.0, 0.5)


@torch.no_grad()
def mismatch(policy: MiniMindForCausalLM, dtype: torch.dtype, prompts: list[list[int]], num_tokens: int,
             temperature: float) -> float:
    """Nats per sampled token between answers in `dtype` and the fp32 policy."""
    engine = Engine(copy.deepcopy(policy).to(dtype), max_batch=len(prompts))
    params = [policy_sampling_params(num_tokens, temperature, seed) for seed in range(len(prompts))]
    errors = []
    for sequence in engine.generate(prompts, params):
        logits = policy(torch.tensor([sequence.token_ids])).logits[0, len(sequence.prompt_ids) - 1:-1]
        completion = torch.tensor(sequence.completion_ids)
        expected = (logits / temperature).log_softmax(-1).gather(1, completion[:, None])[:, 0]
        errors.append((expected - torch.tensor(sequence.logprobs)).abs())
    return torch.cat(errors).mean().item()


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=Path, help="a .pth of a trained model")
    parser.add_argument("--answers", type=positive_int, default=16, help="of each model, dtype and temperature")
    parser.add_argument("--tokens", type=positive_int, default=64, help="of an answer, at most")
    args = parser.parse_args()
    torch.manual_seed(0)
    policies = {f"random {name}": MiniMindForCausalLM(MiniMindConfig(256, 4, use_moe=name == "MoE"))
                for name in ("dense", "MoE")}
    if args.weight:
        policies = {args.weight.stem: read_weight(args.weight)[0].float()} | policies
    rng, results = random.Random(0), {}
    prompts = [random_prompt(rng, 32) for _ in range(args.answers)]
    for name, policy in policies.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            values = [mismatch(policy.eval(), dtype, prompts, args.tokens, temperature) for temperature in TEMPERATURES]
            results[f"{name}, {str(dtype)[6:]}"] = dict(zip(map(str, TEMPERATURES), values, strict=True))
            print(f"{name:16} {str(dtype)[6:]:9}" + "".join(
                f"  temperature {temperature}: {value:.1e}"
                for temperature, value in zip(TEMPERATURES, values, strict=True)), flush=True)
    save_result("rollout_mismatch", results)


if __name__ == "__main__":
    run_main(main)
