"""Online RL: tokens per second of rollouts and of whole steps, against the plain recipe, same prompts, in one run.

Plain: twelve prompts at a time in the loop of benchmarks/plain.py, which waits for the longest answer; then
log-probabilities of policy and reference over the whole vocabulary at every padded position, in fp32; AdamW one tensor
at a time. Ours: `trainer/rl/rollouts.py` on the engine: a finished answer leaves the batch, rows are packed, logits are
computed only for targets. Both take the same number of answers of the same, very different lengths.

`--agent` compares episodes of several turns instead, eight per prompt and all prompts with the same tools, as in
training: `run_episodes` with all at once, each turn continuing the cache of those before, on an engine whose answers
are given; plain one after the other, everything computed again at each turn.

Ours computes as the stages do, in bf16 on a GPU and where the CPU has units for it; plain in fp32, on a GPU in bf16.
Weights are random: speed does not depend on them.

    python benchmarks/rl_speed.py
    python benchmarks/rl_speed.py --agent
"""

import copy
import json
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import torch
from torch import nn

from benchmarks.machine import clock, model_config, model_parser, random_prompt, result_name, save_result
from benchmarks.plain import plain_loop
from dataset.prompts import Prompt, PromptDataset
from model.chat import CALL, END_CALL, EOS, ChatTokenizer
from model.cli import positive_int, run_main
from model.device import choose_device, cpu_has_bfloat16
from model.inference.engine import Engine, SamplingParams
from model.inference.sampling import sample
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import parse_policy_args, policy_parser
from trainer.distributed import World
from trainer.losses import kl_k3, policy_loss
from trainer.optimizer import make_optimizers
from trainer.rl.advantages import GroupRelative
from trainer.rl.episodes import TURN_SEED_STRIDE, run_episodes
from trainer.rl.rewards import add_reward_args
from trainer.rl.rollouts import RolloutStream
from trainer.rl.tools import SCHEMAS
from trainer.rollout_engine import LocalRolloutEngine, add_rollout_engine_args

PLAIN_BATCH, NUM_GENERATIONS, MAX_GEN_LEN, BETA = 12, 6, 192, 0.1
EPISODES_PER_PROMPT = 8  # of which plain plays one


def stage_autocast(device: torch.device) -> torch.autocast:
    """As the stages compute: bf16 on a GPU, and where the CPU has units for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or cpu_has_bfloat16())


class TimedEngine(LocalRolloutEngine):
    """Samples answers of given `lengths`, instead of until the model stops; `seconds`: what the last call took."""

    lengths: list[int] = []
    seconds = 0.0

    def generate(self, prompts, params):
        start = clock(self.model.device)
        params = [replace(one, max_new_tokens=length, stop_ids=())
                  for one, length in zip(params, self.lengths, strict=True)]
        trajectories = super().generate(prompts, params)
        self.seconds = clock(self.model.device) - start
        return trajectories


class LengthReward:
    """The length of an answer as its reward, so that rewards differ."""

    names, weights = ["length"], torch.ones(1)

    def score(self, prompts, trajectories):
        return torch.tensor([[float(len(trajectory.completion_ids))] for trajectory in trajectories])

    def total(self, scores):
        return scores[:, 0]


def plain_step(policy: nn.Module, reference: nn.Module, optimizer, prompts: list[list[int]],
               lengths: list[int]) -> tuple[float, float]:
    """Answers and one update, twelve answers at a time. → seconds of the rollouts, and in all"""
    device = policy.device
    start, rollout_seconds = clock(device), 0.0
    for first in range(0, len(prompts), PLAIN_BATCH):
        batch_lengths = torch.tensor(lengths[first:first + PLAIN_BATCH], device=device)
        max_length, batch_start = int(batch_lengths.max()), clock(device)
        ids, mask = plain_loop(policy, prompts[first:first + PLAIN_BATCH], max_length, temperature=1, top_p=1)
        rollout_seconds += clock(device) - batch_start
        ids, mask = ids.clone(), mask if mask is None else mask.clone()  # out of inference mode
        is_answer = (torch.arange(max_length, device=device) < batch_lengths[:, None]).float()

        def log_probs(model: nn.Module, ids=ids, mask=mask, max_length=max_length) -> torch.Tensor:
            all_log_probs = model(ids, mask).logits[:, :-1].float().log_softmax(-1)
            return all_log_probs.gather(2, ids[:, 1:, None])[:, -max_length:, 0]

        with torch.no_grad():
            ref_log_probs = log_probs(reference)
        new_log_probs = log_probs(policy)
        advantage = (batch_lengths.float() - batch_lengths.float().mean())[:, None]
        losses = (-(new_log_probs - new_log_probs.detach()).exp() * advantage
                  + BETA * kl_k3(new_log_probs, ref_log_probs))
        (((losses * is_answer).sum(1) / is_answer.sum(1)).mean() * PLAIN_BATCH / len(prompts)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return rollout_seconds, clock(device) - start


def compare_steps(config: MiniMindConfig, num_answers: int, repeats: int, rng: random.Random,
                  device: torch.device) -> dict:
    """Both recipes on the same prompts and lengths of answers, in turn."""
    model, autocast = MiniMindForCausalLM(config).to(device), partial(stage_autocast, device)
    policy, reference = copy.deepcopy(model), copy.deepcopy(model).eval().requires_grad_(False)
    parser = policy_parser("", data_path="x", from_weight="x", save_weight="x")
    add_reward_args(parser)
    add_rollout_engine_args(parser)
    args = parse_policy_args(parser, [
        "--batch_size=4", f"--accumulation_steps={num_answers // NUM_GENERATIONS // 4}", "--max_seq_len=128",
        f"--num_generations={NUM_GENERATIONS}", f"--max_gen_len={MAX_GEN_LEN}", f"--beta={BETA}"])
    run = SimpleNamespace(args=args, world=World(), device=device, tokenizer=ChatTokenizer(), autocast=autocast,
                          summon_full_params=nullcontext)
    prompts = object.__new__(PromptDataset)  # no file behind them
    prompts.prompts = [Prompt(random_prompt(rng, rng.randint(16, 96)), [])
                       for _ in range(num_answers // NUM_GENERATIONS)]
    engine = TimedEngine(model, run.tokenizer, autocast())
    rollouts = RolloutStream(run, model, prompts, engine, LengthReward(), GroupRelative(scale=True), reference)
    optimizer, = make_optimizers(model, "adamw", 1e-6, 0.0)
    plain_optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, foreach=False)
    speeds = {name: [] for name in ("plain_rollout", "ours_rollout", "plain_step", "ours_step")}
    for repeat in range(repeats + 1):
        # most answers are short, a few are long: what a padded batch waits for
        lengths = [min(MAX_GEN_LEN, 8 + int(rng.expovariate(1 / 48))) for _ in range(num_answers)]
        if repeat == 0:
            lengths = [4] * num_answers  # a warm-up
        engine.lengths = lengths
        start = clock(device)
        step = rollouts.next_batch(repeat)
        for batch in step.micro_batches:
            loss = policy_loss(model, batch, "grpo", 0.2, 0.2, BETA, 0.0, 1.0)
            (loss.loss_sum / step.num_items).backward()
        optimizer.step()
        optimizer.zero_grad()
        step_seconds = clock(device) - start
        prompt_ids = [prompt.ids for prompt in prompts.prompts for _ in range(NUM_GENERATIONS)]
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            plain_rollout, plain_seconds = plain_step(policy, reference, plain_optimizer, prompt_ids, lengths)
        if repeat:
            for name, seconds in zip(speeds, (plain_rollout, engine.seconds, plain_seconds, step_seconds), strict=True):
                speeds[name].append(sum(lengths) / seconds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {kind: medians[f"ours_{kind}"] / medians[f"plain_{kind}"] for kind in ("rollout", "step")}
    for kind, ratio in ratios.items():
        plain, ours = medians[f"plain_{kind}"], medians[f"ours_{kind}"]
        print(f"{kind:8} plain {plain:8,.1f}   ours {ours:8,.1f} answered tokens/s   ratio {ratio:5.2f}", flush=True)
    return medians | {"ratios": ratios, "answers": num_answers, "all": speeds}


def recite(scripts: list[list[list[int]]]) -> Callable:
    """A `sample` that samples, and then returns the next token of the episode's script: a list of turns, by seed."""
    turns = {number + TURN_SEED_STRIDE * turn: iter(tokens) for number, script in enumerate(scripts)
             for turn, tokens in enumerate(script)}

    def sample_script(logits, params, u, *_):
        _, *rest = sample(logits, params, u)
        return [next(turns[p.seed]) for p in params], *rest
    return sample_script


def compare_episodes(config: MiniMindConfig, num_episodes: int, repeats: int, rng: random.Random,
                     device: torch.device) -> dict:
    """Episodes of two calls and an answer, eight per prompt: all at once, and one after the other, computed anew."""
    model, tokenizer = MiniMindForCausalLM(config).eval().requires_grad_(False).to(device), ChatTokenizer()
    system = {"role": "system", "content": "", "tools": [SCHEMAS[name] for name in ("calculate_math", "text_length")]}
    speeds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(repeats):
        prompts, scripts = [], []
        for _ in range(num_episodes // EPISODES_PER_PROMPT):
            question = {"role": "user", "content": f"What is {rng.randint(100, 999)} + 7, twice?"}
            prompts += [Prompt(tokenizer.prompt([system, question]), [system])] * EPISODES_PER_PROMPT
        for _ in range(num_episodes):
            calls = [{"name": "calculate_math", "arguments": {"expression": f"{rng.randint(100, 999)} + {n}"}}
                     for n in range(2)]
            turns = [[CALL, *tokenizer.encode_text(f"\n{json.dumps(call)}\n"), END_CALL, EOS] for call in calls]
            scripts.append([*turns, [*random_prompt(rng, rng.randint(12, 32)), EOS]])
        start = clock(device)
        params = [SamplingParams(64, 1.0, 1.0, seed=number) for number in range(num_episodes)]
        with stage_autocast(device), mock.patch("model.inference.engine.sample", recite(scripts)):
            engine = Engine(model, max_batch=min(64, num_episodes))
            episodes = run_episodes(engine, prompts, params, tokenizer)
        speeds["ours"].append(sum(sum(episode.action_mask) for episode in episodes) / (clock(device) - start))
        assert all(len(episode.turns) == 3 for episode in episodes), "an episode did not go as written"
        some, start = episodes[::EPISODES_PER_PROMPT], clock(device)
        for episode in some:
            position = 0
            for sampled, tokens in groupby(episode.action_mask):
                length = len(list(tokens))
                if sampled:
                    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                        plain_loop(model, [episode.prompt.ids + episode.completion_ids[:position]], length)
                position += length
        speeds["plain"].append(sum(sum(episode.action_mask) for episode in some) / (clock(device) - start))
    result = {kind: statistics.median(values) for kind, values in speeds.items()}
    result["ratio"] = result["ours"] / result["plain"]
    print(f"episodes  plain {result['plain']:8,.1f}   ours {result['ours']:8,.1f} sampled tokens/s   "
          f"ratio {result['ratio']:5.2f}", flush=True)
    return result | {"episodes": num_episodes, "all": speeds}


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--answers", type=positive_int, default=48, help="answers per step, or episodes: 24, 48, …")
    parser.add_argument("--repeats", type=positive_int, default=2)
    parser.add_argument("--agent", action="store_true", help="episodes with tools")
    args = parser.parse_args()
    if args.answers % 24:
        parser.error(f"--answers {args.answers} is not a multiple of 24")
    torch.manual_seed(0)
    compare = compare_episodes if args.agent else compare_steps
    result = compare(model_config(args), args.answers, args.repeats, random.Random(0), choose_device(args.device))
    save_result(result_name(f"rl_speed{'_agent' * args.agent}", args), result)


if __name__ == "__main__":
    run_main(main)
