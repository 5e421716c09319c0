"""Online RL: tokens a second of rollouts and of whole steps, against the plain recipe, same prompts, in one run.

Plain: twelve prompts at a time, padded on the left, products as `F.linear` makes them, a cache grown by concatenation
until the longest answer ends; then log-probabilities of policy and reference over the whole vocabulary at every padded
position, in fp32; AdamW one tensor at a time. Ours: `trainer/rl/rollouts.py` on the engine: answers leave when
they end, rows are packed, logits are computed where there is a label. Both take the same number of answers of the same,
very different lengths. `--agent` compares episodes of several turns instead, eight to a prompt and all prompts with the
same tools, as in training: `run_episodes` with all at once, each turn going on from the cache of those before, on an
engine that says what is written for it; plain one after the other, everything read again at each turn. Ours computes
as the stages do, in bf16 on a GPU and where the CPU has units for it; plain in fp32, on a GPU in bf16. Weights are
random: speed does not depend on what they say.

    python benchmarks/rl_speed.py
    python benchmarks/rl_speed.py --agent
"""

import argparse
import copy
import json
import random
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.decode_speed import GrowingCache, plain_loop
from benchmarks.machine import save_result
from dataset.prompts import Prompt, PromptDataset
from model.chat import CALL, END_CALL, EOS, ChatTokenizer
from model.cli import Parser, positive_int, run_main
from model.device import choose_device, cpu_has_bfloat16
from model.inference.engine import Engine, SamplingParams
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import parse_policy_args, policy_parser
from trainer.distributed import World
from trainer.losses import kl_k3, policy_loss
from trainer.metrics import synchronise
from trainer.optimizer import make_optimizers
from trainer.rl.advantages import GroupRelative
from trainer.rl.episodes import TURN_SEED_STRIDE, run_episodes
from trainer.rl.rewards import add_reward_args
from trainer.rl.rollouts import RolloutStream
from trainer.rl.tools import SCHEMAS
from trainer.rollout_engine import LocalRolloutEngine

PLAIN_BATCH, GENERATIONS, LONGEST, BETA = 12, 6, 192, 0.1
PER_PROMPT = 8  # episodes; plain plays one of them


def half_where_fast(device: torch.device) -> torch.autocast:
    """As the stages compute: bf16 on a GPU, and where the CPU has units for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or cpu_has_bfloat16())


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    synchronise(device)
    return time.perf_counter()


class Timed(LocalRolloutEngine):
    """Answers of given lengths instead of those that a model would end by itself; remembers how long sampling took."""

    lengths: list[int] = []
    seconds = 0.0

    def generate(self, prompts, samplings):
        began = now(self.model.device)
        how = [replace(one, max_new_tokens=n, stop_ids=()) for one, n in zip(samplings, self.lengths, strict=True)]
        answers = super().generate(prompts, how)
        self.seconds = now(self.model.device) - began
        return answers


class Lengths:
    """Rewards that differ."""

    names, weights = ["length"], torch.ones(1)

    def score(self, prompts, trajectories):
        return torch.tensor([[float(len(trajectory.completion_ids))] for trajectory in trajectories])

    def total(self, scores):
        return scores[:, 0]


@torch.inference_mode()
@mock.patch("model.linear.linear", F.linear)
@mock.patch("model.moe.linear", F.linear)
def plain_rollout(model: nn.Module, prompts: list[list[int]], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts answered together. → ids [B, T] and mask"""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    cache, last = GrowingCache(), ids
    for _ in range(tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -last.shape[1]:]
        logits = model(last, mask, positions, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        last = torch.multinomial(logits.softmax(-1), 1)
        ids, mask = torch.cat((ids, last), 1), torch.cat((mask, torch.ones_like(last)), 1)
    return ids, mask


def plain_step(policy: nn.Module, reference: nn.Module, optimizer, prompts: list[list[int]],
               lengths: list[int]) -> tuple[float, float]:
    """Answers and one update, twelve answers at a time. → seconds of the rollouts, and in all"""
    device = policy.device
    began, sampling = now(device), 0.0
    for start in range(0, len(prompts), PLAIN_BATCH):
        part = prompts[start:start + PLAIN_BATCH]
        wanted = torch.tensor(lengths[start:start + PLAIN_BATCH], device=device)
        at = now(device)
        ids, mask = plain_rollout(policy, part, int(wanted.max()))
        sampling += now(device) - at
        ids, mask = ids.clone(), mask.clone()  # out of inference mode
        width = ids.shape[1] - int(wanted.max())
        answered = (torch.arange(ids.shape[1] - width, device=device) < wanted[:, None]).float()

        def log_probs(model: nn.Module, ids=ids, mask=mask, width=width) -> torch.Tensor:
            all_log_p = model(ids, mask).logits[:, :-1].float().log_softmax(-1)
            return all_log_p.gather(2, ids[:, 1:, None])[:, width - 1:, 0]

        with torch.no_grad():
            theirs = log_probs(reference)
        new = log_probs(policy)
        advantage = (wanted.float() - wanted.float().mean())[:, None]
        losses = -(new - new.detach()).exp() * advantage + BETA * kl_k3(new, theirs)
        (((losses * answered).sum(1) / answered.sum(1)).mean() * PLAIN_BATCH / len(prompts)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return sampling, now(device) - began


def compare_steps(config: MiniMindConfig, answers: int, repeats: int, dice: random.Random,
                  device: torch.device) -> dict:
    """Both recipes on the same prompts and lengths of answers, in turn."""
    model, half = MiniMindForCausalLM(config).to(device), partial(half_where_fast, device)
    policy, reference = copy.deepcopy(model), copy.deepcopy(model).eval().requires_grad_(False)
    parser = policy_parser("", data_path="x", from_weight="x", save_weight="x")
    add_reward_args(parser)
    args = parse_policy_args(parser, [
        "--batch_size", "4", "--accumulation_steps", str(answers // GENERATIONS // 4), "--num_generations",
        str(GENERATIONS), "--max_seq_len", "128", "--max_gen_len", str(LONGEST), "--beta", str(BETA)])
    run = SimpleNamespace(args=args, world=World(), device=device, tokenizer=ChatTokenizer(), autocast=half,
                          whole=nullcontext)
    prompts = object.__new__(PromptDataset)  # no file behind them
    prompts.prompts = [Prompt([dice.randrange(36, config.vocab_size) for _ in range(dice.randint(16, 96))], [])
                       for _ in range(answers // GENERATIONS)]
    timed = Timed(model, run.tokenizer, half())
    rollouts = RolloutStream(run, model, prompts, timed, Lengths(), GroupRelative(scale=True), reference)
    ours_optimizer, = make_optimizers(model, "adamw", 1e-6, 0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, foreach=False)
    speeds = {name: [] for name in ("plain_rollout", "ours_rollout", "plain_step", "ours_step")}
    for repeat in range(repeats + 1):
        # most answers are short, a few are long: what a padded batch waits for
        lengths = [min(LONGEST, 8 + int(dice.expovariate(1 / 48))) for _ in range(answers)]
        if repeat == 0:
            lengths = [4] * answers  # a warm-up
        timed.lengths = lengths
        began = now(device)
        step = rollouts.take(repeat)
        for batch in step.batches:
            loss = policy_loss(model, batch, "grpo", 0.2, 0.2, BETA, 0.0, 1.0)
            (loss.loss_sum / step.num_items).backward()
        ours_optimizer.step()
        ours_optimizer.zero_grad()
        seconds = now(device) - began
        asked = [prompt.ids for prompt in prompts.prompts for _ in range(GENERATIONS)]
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            sampling, whole = plain_step(policy, reference, optimizer, asked, lengths)
        if repeat:
            for name, of_one in zip(speeds, (sampling, timed.seconds, whole, seconds), strict=True):
                speeds[name].append(sum(lengths) / of_one)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {kind: medians[f"ours_{kind}"] / medians[f"plain_{kind}"] for kind in ("rollout", "step")}
    for kind, ratio in ratios.items():
        plain, ours = medians[f"plain_{kind}"], medians[f"ours_{kind}"]
        print(f"{kind:8} plain {plain:8,.1f}   ours {ours:8,.1f} answered tokens/s   ratio {ratio:5.2f}", flush=True)
    return medians | {"ratios": ratios, "answers": answers, "all": speeds}


class Reciting(Engine):
    """Draws as ever, and then says what stands in `scripts`: of each episode the turns, which its seeds tell."""

    scripts: list[list[list[int]]] = []

    def _draw(self, logits, sequences):
        _, *rest = super()._draw(logits, sequences)
        asked = [(divmod(s.params.seed, TURN_SEED_STRIDE), len(s.completion_ids)) for s in sequences]
        return [self.scripts[episode][turn][place] for (turn, episode), place in asked], *rest


def compare_episodes(config: MiniMindConfig, episodes: int, repeats: int, dice: random.Random,
                     device: torch.device) -> dict:
    """Episodes of two calls and an answer, eight to a prompt: all at once, and one after the other, read anew."""
    model, tokenizer = MiniMindForCausalLM(config).eval().requires_grad_(False).to(device), ChatTokenizer()
    system = {"role": "system", "content": "", "tools": [SCHEMAS[name] for name in ("calculate_math", "text_length")]}
    speeds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(repeats):
        prompts, scripts = [], []
        for _ in range(episodes // PER_PROMPT):
            asked = {"role": "user", "content": f"What is {dice.randint(100, 999)} + 7, twice?"}
            prompts += [Prompt(tokenizer.prompt([system, asked]), [system])] * PER_PROMPT
        for _ in range(episodes):
            calls = [{"name": "calculate_math", "arguments": {"expression": f"{dice.randint(100, 999)} + {n}"}}
                     for n in range(2)]
            turns = [[CALL, *tokenizer.encode_text(f"\n{json.dumps(call)}\n"), END_CALL, EOS] for call in calls]
            answer = [dice.randrange(36, config.vocab_size) for _ in range(dice.randint(12, 32))]
            scripts.append([*turns, [*answer, EOS]])
        Reciting.scripts = scripts
        began = now(device)
        samplings = [SamplingParams(64, 1.0, 1.0, seed=number) for number in range(episodes)]
        with half_where_fast(device):
            engine = Reciting(model, max_batch=min(64, episodes))
            played = run_episodes(engine, prompts, samplings, tokenizer)
        speeds["ours"].append(sum(sum(episode.action_mask) for episode in played) / (now(device) - began))
        assert all(len(episode.turns) == 3 for episode in played), "an episode did not go as written"
        few, began = played[::PER_PROMPT], now(device)
        for episode in few:
            for end in (i + 1 for i, sampled in enumerate(episode.action_mask)
                        if sampled and not (episode.action_mask[i + 1:] or [False])[0]):
                start = end - (episode.action_mask[:end][::-1] + [False]).index(False)
                with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                    plain_loop(model, [episode.prompt.ids + episode.completion_ids[:start]], end - start)
        speeds["plain"].append(sum(sum(episode.action_mask) for episode in few) / (now(device) - began))
    result = {kind: statistics.median(values) for kind, values in speeds.items()}
    result["ratio"] = result["ours"] / result["plain"]
    print(f"episodes  plain {result['plain']:8,.1f}   ours {result['ours']:8,.1f} sampled tokens/s   "
          f"ratio {result['ratio']:5.2f}", flush=True)
    return result | {"episodes": episodes, "all": speeds}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=positive_int, default=768)
    parser.add_argument("--num_hidden_layers", type=positive_int, default=8)
    parser.add_argument("--answers", type=positive_int, default=48,
                        help="answers in a step, or episodes; a multiple of 24")
    parser.add_argument("--repeats", type=positive_int, default=2)
    parser.add_argument("--agent", action="store_true", help="episodes with tools")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.answers % 24:
        parser.error(f"--answers {args.answers} is no multiple of 24")
    torch.manual_seed(0)
    config, dice = MiniMindConfig(args.hidden_size, args.num_hidden_layers), random.Random(0)
    compare = compare_episodes if args.agent else compare_steps
    result = compare(config, args.answers, args.repeats, dice, choose_device(args.device))
    save_result(f"rl_speed{'_agent' * args.agent}_{args.hidden_size}x{args.num_hidden_layers}", result)


if __name__ == "__main__":
    run_main(main)
