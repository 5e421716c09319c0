"""Online RL: losses against trl and by hand, rollouts → batches to the token, and whole stages on tiny models."""

import itertools
import json
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from lab import DEADLINE, TOKENIZER, small_model
from torch._dynamo.utils import counters
from torch.testing import assert_close

from dataset.prompts import Prompt, PromptDataset, parse_ground_truth
from model.chat import EOS
from model.cli import UserError
from scripts.draw_curves import draw_curves
from trainer import losses, train_agent, train_grpo, train_ppo
from trainer import trainer as loop
from trainer.arguments import parse_policy_args, policy_parser
from trainer.distributed import World
from trainer.losses import kl_k3, policy_losses, policy_objective, value_losses
from trainer.rl import rollouts as rollouts_module
from trainer.rl.advantages import GAE, GroupRelative, SPOValueTracker, gae, group_advantages
from trainer.rl.episodes import EpisodeEngine
from trainer.rl.packing import colorize_advantages, group_by_prefix
from trainer.rl.rewards import Rewards
from trainer.rl.rollouts import RolloutStream
from trainer.rl.trajectory import RolloutGroup, Trajectory
from trainer.rollout_engine import LocalRolloutEngine, add_rollout_engine_args

# -- the losses --------------------------------------------------------------------------------------------------------


def random_case(documents: int = 5) -> tuple[dict, torch.Tensor]:
    """A batch of what `policy_objective` reads, for documents of several lengths, and the new log-probabilities."""
    count = torch.randint(1, 9, (documents,))
    document = torch.arange(documents).repeat_interleave(count)
    new = -3 * torch.rand(len(document), dtype=torch.float64)
    batch = {"document": document, "old_logprobs": new + 0.4 * torch.randn_like(new),
             "advantage": torch.randn_like(new), "ref_logprobs": new + 0.4 * torch.randn_like(new),
             "weight": torch.ones_like(new)}
    batch["rollout_logprobs"] = batch["old_logprobs"] + 0.2 * torch.randn_like(new)
    batch["advantage"] = torch.randn(documents, dtype=torch.float64)[document]  # one a document
    return batch, new.requires_grad_()


def loss_of_trl(kind: str, level: str, batch: dict, new: torch.Tensor, low: float, high: float, beta: float,
                is_cap: float) -> torch.Tensor:
    """trl's GRPO loss on the same log-probabilities, padded."""
    documents = int(batch["document"].max()) + 1
    places = [(batch["document"] == d).nonzero()[:, 0] for d in range(documents)]
    T = max(map(len, places))

    def padded(flat: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cat((flat[at], flat.new_zeros(T - len(at)))) for at in places])

    mask = padded(torch.ones_like(new))
    trainer = mock.MagicMock()
    trainer.configure_mock(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta,
        loss_type=kind, epsilon_low=low, epsilon_high=high, use_vllm=bool(is_cap), aux_loss_enabled=False,
        vllm_importance_sampling_correction=bool(is_cap), current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        model=SimpleNamespace(training=True))
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x,
                                          gather_for_metrics=lambda x: x)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (padded(new), mask, None)
    correction = (batch["old_logprobs"] - batch["rollout_logprobs"]).exp().clamp(max=is_cap or 1.0)
    ids = torch.zeros_like(mask).long()
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask,
              "advantages": torch.stack([batch["advantage"][at[0]] for at in places]),
              "old_per_token_logps": padded(batch["old_logprobs"]),
              "ref_per_token_logps": padded(batch["ref_logprobs"]),
              "importance_sampling_ratio": padded(correction), "num_items_in_batch": mask.sum()}
    GRPOTrainer = pytest.importorskip("trl", reason="trl needs python 3.11").GRPOTrainer
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta, is_cap", [(0.0, 0.0), (0.3, 0.0), (0.3, 1.1)])
@pytest.mark.parametrize("kind, theirs, level, low, high, by_sequence", [
    ("grpo", "grpo", "token", 0.2, 0.28, True), ("grpo", "dapo", "token", 0.2, 0.2, False),
    ("spo", "dapo", "token", 0.2, 0.28, False), ("cispo", "cispo", "token", 0.0, 1.3, False),
    ("gspo", "grpo", "sequence", 0.1, 0.2, True)])
def test_the_loss_and_its_gradient_are_those_of_trl(kind, theirs, level, low, high, by_sequence, beta, is_cap):
    batch, new = random_case()
    units = len(new)
    if by_sequence:
        batch["weight"], units = 1 / batch["document"].bincount()[batch["document"]].double(), 5
    ours = policy_objective(new, batch, kind, low, high, beta, is_cap)[0] / units
    expected = loss_of_trl(theirs, level, batch, new, low, high, beta, is_cap)
    assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    for one, other in itertools.pairwise(torch.autograd.grad(loss, new, retain_graph=True)[0]
                                         for loss in (ours, expected)):
        assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_gspo_counts_the_answers_that_are_clipped():
    ratios = torch.tensor([0.01, -0.01, 0.02, -0.02, 0.01, 0.02])  # the first answer's ratio is exactly 1
    batch = {"old_logprobs": torch.zeros(6), "rollout_logprobs": torch.zeros(6), "advantage": torch.ones(6),
             "weight": torch.ones(6), "document": torch.tensor([0, 0, 0, 0, 1, 1])}
    _, metrics = losses.policy_objective(ratios, batch, "gspo", 3e-4, 4e-4, 0.0, 0.0)
    assert metrics["clipped"] == 2


def test_equal_rewards_have_no_advantage_at_all():
    assert not group_advantages(torch.full((1, 6), 7.3), True).any()
    weights = {"exact": 1.0, "format": 0.2, "length": 0.1}
    scores = torch.tensor([0.3, 0.7, 0.9]).expand(7, 3)
    assert len(set(Rewards(dict.fromkeys(weights), weights).total(scores).tolist())) == 1


def test_a_clipped_token_has_no_gradient_in_grpo_and_one_in_cispo():
    new = torch.tensor([0.5], requires_grad=True)
    for kind, expected in (("grpo", 0.0), ("cispo", -1.2)):
        loss = policy_losses(new, torch.zeros(1), torch.ones(1), kind, 0.2, 0.2 if kind == "grpo" else 1.2)
        assert float(torch.autograd.grad(loss.sum(), new)[0]) == pytest.approx(expected)


def test_advantages_of_a_group_worked_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert group_advantages(rewards, False).tolist() == [[-2, -1, 3], [0, 0, 0]]
    assert_close(group_advantages(rewards, True)[0], torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4))


def test_gae_is_the_discounted_sum_of_its_deltas():
    rewards, values, gamma, lam = torch.randn(7).double(), torch.randn(7).double(), 0.9, 0.8
    deltas = [rewards[t] + (gamma * values[t + 1] if t < 6 else 0) - values[t] for t in range(7)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 7)) for t in range(7)]
    assert_close(gae(rewards, values, gamma, lam), torch.stack(expected))
    whole = gae(rewards, values, 1.0, 1.0) + values  # λ = γ = 1: returns are sums of rewards
    assert_close(whole, rewards.flip(0).cumsum(0).flip(0))


def random_rollout(lengths: list[int], rewards: list[float]) -> tuple[list[RolloutGroup], list[dict]]:
    """One answer to each of len(lengths) prompts, in two micro-batches that hold them in another order."""
    groups = [RolloutGroup(number, [], torch.zeros(1, 1), torch.tensor([reward]))
              for number, reward in enumerate(rewards)]
    batches = []
    for members in (torch.tensor([2, 0]), torch.tensor([1])):
        counts = torch.tensor(lengths)[members]
        batch = {"trajectory": members.repeat_interleave(counts),
                 "document": torch.arange(len(members)).repeat_interleave(counts)}
        batches.append(batch | {name: torch.randn(int(counts.sum()))
                                for name in ("old_logprobs", "ref_logprobs", "value")})
    return groups, batches


def test_ppo_rewards_the_last_token_and_each_ones_kl_and_whitens_the_advantages():
    groups, batches = random_rollout([3, 1, 4], [1.0, -2.0, 0.5])
    expected, returns = [], []
    for batch in batches:
        for number in batch["trajectory"].unique_consecutive().tolist():
            inside = batch["trajectory"] == number
            rewards = -0.3 * (batch["old_logprobs"] - batch["ref_logprobs"])[inside]
            rewards[-1] += float(groups[number].rewards)
            expected.append(gae(rewards, batch["value"][inside], 0.9, 0.8))
            returns.append(expected[-1] + batch["value"][inside])
    GAE(0.9, 0.8, kl_coef=0.3).compute_advantages(groups, batches, World())
    expected = torch.cat(expected)
    assert_close(torch.cat([batch["returns"] for batch in batches]), torch.cat(returns))
    assert_close(torch.cat([batch["advantage"] for batch in batches]),
                 (expected - expected.mean()) / expected.std(correction=0), rtol=1e-4, atol=1e-5)


def test_spo_compares_an_answer_with_what_its_prompt_earned_before():
    tracker = SPOValueTracker(3, half_life=0.1)
    groups, batches = random_rollout([3, 1, 4], [1.0, -2.0, 0.5])
    for earlier in (torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])):  # v after one rollout: its rewards
        tracker.compute_advantages(groups, batches, World())
        raw = torch.tensor([1.0, -2.0, 0.5]) - earlier
        expected = (raw - raw.mean()) / (raw.std() + 1e-4)
        for batch in batches:
            assert_close(batch["advantage"], expected[batch["trajectory"]])
        groups, batches = random_rollout([3, 1, 4], [1.0, -2.0, 0.5])
    tracker.before_rollout(lambda: 0.25)
    assert tracker.drift == 0.25


def test_values_move_no_further_than_the_clip_and_k3_estimates_the_kl():
    values, old, returns = torch.tensor([1.0, 0.1, 3.0]), torch.zeros(3), torch.tensor([2.0, 2.0, 0.0])
    assert_close(value_losses(values, old, returns, 0.2), torch.tensor([1.8**2, 1.9**2, 9.0]) / 2)
    assert_close(value_losses(values, old, returns, 0.0), torch.tensor([1.0, 1.9**2, 9.0]) / 2)
    p, q = torch.randn(2, 5).log_softmax(-1)
    assert_close((p.exp() * kl_k3(p, q)).sum(), (p.exp() * (p - q)).sum())  # in expectation under p


def test_spo_forgets_as_far_as_the_policy_has_drifted():
    tracker = SPOValueTracker(3, half_life=0.1, min_decay=0.25, max_decay=1.0)
    assert tracker.values([0, 1]).tolist() == [0, 0]
    tracker.update([0], torch.tensor([1.0]))
    assert tracker.values([0, 1]).tolist() == [1, 1]  # a prompt never seen is worth the mean
    tracker.drift += 0.1  # half: v = 1 + (0 - 1) / (0.5 · 1 + 1), n = 1.5
    tracker.update([0], torch.tensor([0.0]))
    assert_close(tracker.values([0]), torch.tensor([1 / 3]))
    tracker.drift += 10.0  # all but the smallest share: n = 0.25 · 1.5 + 1
    tracker.update([0], torch.tensor([1.0]))
    assert_close(tracker.values([0]), torch.tensor([1 / 3 + (2 / 3) / 1.375]))
    other = SPOValueTracker(3, 0.1, 0.25, 1.0)
    other.load_state_dict(tracker.state_dict())
    assert other.values([0, 1, 2]).tolist() == tracker.values([0, 1, 2]).tolist()


# -- rollouts → batches ------------------------------------------------------------------------------------------------


class Scripted:
    """An engine whose answers are made up, with observations in them, and which remembers its requests."""

    def __init__(self):
        self.requests: list[tuple] = []

    def update(self) -> None:
        pass

    def generate(self, prompts, samplings) -> list[Trajectory]:
        self.requests += zip(prompts, samplings, strict=True)
        answers = []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            rng = np.random.default_rng(sampling.seed)
            ids = rng.integers(40, 6400, rng.integers(2, 20)).tolist() + [EOS]
            sampled = (rng.random(len(ids)) < 0.8).tolist()[:-1] + [True]
            logprobs = [-rng.random() if drawn else 0.0 for drawn in sampled]
            answers.append(Trajectory(prompt, ids, sampled, logprobs, "stop"))
        return answers


class Seeded:
    """Rewards that depend on the answer alone."""

    names, weights = ["odd", "short"], torch.tensor([1.0, 0.5])

    def score(self, prompts, trajectories) -> torch.Tensor:
        return torch.tensor([[t.completion_ids[0] % 2, 1 / len(t.completion_ids)] for t in trajectories])

    def total(self, scores) -> torch.Tensor:
        return scores @ self.weights


def make_stream(size: int = 1, rank: int = 0, engine=None, rewards=None, flags: tuple = (),
                reference=None) -> RolloutStream:
    defaults = {"--batch_size": 2, "--accumulation_steps": 2, "--num_generations": 3, "--max_seq_len": 24,
                "--max_gen_len": 24, "--loss_type": "grpo", "--beta": 0, "--device": "cpu"}
    flags = [str(part) for pair in defaults.items() for part in pair] + [str(flag) for flag in flags]
    parser = policy_parser("", data_path="x", from_weight="x", save_weight="x")
    add_rollout_engine_args(parser)
    parser.set_defaults(reward_mix="", reward_weight=None, reward_model_path=None, judge_url=None)
    args = parse_policy_args(parser, flags)
    rng = np.random.default_rng(0)
    prompts = object.__new__(PromptDataset)
    prompts.prompts = [Prompt(rng.integers(40, 6400, rng.integers(3, 20)).tolist(), [], source=f"rows:{i}")
                       for i in range(10)]
    run = SimpleNamespace(args=args, world=World(rank, size), device=torch.device("cpu"), autocast=nullcontext,
                          summon_full_params=nullcontext, tokenizer=TOKENIZER)
    estimator = GroupRelative(scale=bool(args.scale_rewards))
    return RolloutStream(run, small_model(), prompts, engine or Scripted(), rewards or Seeded(), estimator, reference)


@pytest.mark.parametrize(("flags", "num_ranks", "mini_batches"), [
    ((), 1, 6), ((), 2, 12), (("--loss_type", "spo"), 1, 2), (("--mini_batch_size", 99), 1, 1),
    (("--mini_batch_size", 5), 1, 3)])
def test_mini_batch_size_counts_the_answers_of_all_ranks_in_a_step(flags, num_ranks, mini_batches):
    rollouts = make_stream(num_ranks, flags=("--mini_batch_size", 2, *flags))
    assert rollouts.steps_per_rollout == rollouts.settings["mini_batches"] == mini_batches


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_batch_trains_what_was_sampled_with_its_own_numbers(aggregation):
    engine = Scripted()
    rollouts = make_stream(engine=engine, flags=("--aggregation", aggregation))
    with mock.patch.object(Scripted, "generate", autospec=True, side_effect=Scripted.generate) as spy:
        step = rollouts.next_batch(0)
    answers = spy.side_effect(Scripted(), *map(list, zip(*engine.requests, strict=True)))
    assert len(answers) == 12
    rewards = torch.stack([Seeded().total(Seeded().score(None, [answer])) for answer in answers]).view(4, 3)
    advantages = group_advantages(rewards, True).flatten().tolist()
    expected = sorted((token, round(logp, 6), round(advantage, 5),
                       round(1 / sum(answer.action_mask) if aggregation == "sequence" else 1.0, 6))
                      for answer, advantage in zip(answers, advantages, strict=True)
                      for token, drawn, logp in zip(answer.completion_ids, answer.action_mask, answer.logprobs,
                                                    strict=True) if drawn)
    names, digits = ("targets", "rollout_logprobs", "advantage", "weight"), (0, 6, 5, 6)
    actual = sorted(tuple(round(number, d) for number, d in zip(row, digits, strict=True))
                   for batch in step.micro_batches
                   for row in zip(*(batch[name].tolist() for name in names), strict=True))
    assert len(actual) == len(expected) and np.allclose(actual, expected, atol=2e-5)
    assert sum(EOS in batch["targets"] for batch in step.micro_batches)  # the stop token is trained
    assert step.num_items == (12 if aggregation == "sequence" else len(expected))
    assert step.num_items == pytest.approx(sum(float(batch["weight"].sum()) for batch in step.micro_batches))


def test_each_answer_has_a_seed_of_its_own_and_each_rollout_new_ones():
    engine = Scripted()
    rollouts = make_stream(engine=engine)
    rollouts.next_batch(0), rollouts.next_batch(1)
    seeds = [sampling.seed for _, sampling in engine.requests]
    assert len(set(seeds)) == len(seeds) == 24
    for _, params in engine.requests:  # the policy is the whole distribution
        assert (params.top_p, params.top_k, params.min_p, params.temperature) == (1, 0, 0, 1)
        assert not params.has_penalties
    by_rank = []
    for rank in range(2):
        engine = Scripted()
        alone = make_stream(2, rank, engine, flags=("--global_batch_size", 4))
        with mock.patch.object(World, "gather", lambda _, value: [value, value]):
            alone.next_batch(0)
        by_rank.append({sampling.seed for _, sampling in engine.requests})
    assert not by_rank[0] & by_rank[1] and by_rank[0] | by_rank[1] == set(seeds[:12])


def test_what_is_known_before_the_update_is_exactly_what_the_update_starts_from():
    rollouts = make_stream(flags=("--mini_batches", 2, "--update_epochs", 2), reference=small_model())
    rollouts.reference.load_state_dict(rollouts.model.state_dict())
    for number in range(4):
        step = rollouts.next_batch(number)
        assert rollouts.can_checkpoint == (number == 3)
        for batch in step.micro_batches:
            loss = losses.policy_loss(rollouts.model, batch, "grpo", 0.2, 0.2, 0.1, 0.0, 1.0)
            assert float(loss.metrics["approx_kl"]) == float(loss.metrics["kl"]) == float(loss.metrics["clipped"]) == 0
    assert len(rollouts.engine.requests) == 12


def test_old_and_reference_log_probabilities_are_each_models_own_and_the_drift_is_their_kl():
    rollouts = make_stream(flags=("--temperature", 0.7, "--update_epochs", 2), reference=small_model())
    batches = rollouts.next_batch(0).micro_batches

    @torch.no_grad()
    def log_probs(model, batch) -> torch.Tensor:
        logits = model(**losses.model_inputs(batch)).logits / 0.7
        return logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]

    for batch in batches:
        assert_close(batch["old_logprobs"], log_probs(rollouts.model, batch))
        assert_close(batch["ref_logprobs"], log_probs(rollouts.reference, batch))
    for parameter in rollouts.model.parameters():
        parameter.data *= 1.1
    kl = torch.cat([kl_k3(batch["old_logprobs"], log_probs(rollouts.model, batch)) for batch in batches])
    assert rollouts.measure_policy_kl() == pytest.approx(float(kl.mean()), rel=1e-4) != 0
    assert rollouts.measure_policy_kl() == 0  # the same drift is not counted twice


def test_a_prompt_is_computed_once_for_all_of_its_answers_that_fit():
    rollouts = make_stream(flags=("--batch_size", 4, "--accumulation_steps", 1, "--max_gen_len", 60))
    (batch,) = (step := rollouts.next_batch(0)).micro_batches
    prompts = {tuple(prompt.ids): prompt.ids for prompt, _ in rollouts.engine.requests}
    answers = Scripted().generate(*map(list, zip(*rollouts.engine.requests, strict=True)))
    assert len(prompts) == 4 and len(answers) == 12
    expected = sum(map(len, prompts)) + sum(len(answer.completion_ids) - 1 for answer in answers)
    assert int(batch["attention_mask"].sum()) == expected
    assert group_by_prefix(answers[:3], 10_000)[0].members == [0, 1, 2]
    size = len(answers[0].tokens) - 1
    assert [group.members for group in group_by_prefix(answers[:3], size)] == [[0], [1], [2]]  # none is too large
    assert step.num_tokens == expected


def test_on_a_cpu_a_rollout_is_learned_in_small_micro_batches(monkeypatch):
    flags = ("--batch_size", 4, "--accumulation_steps", 1, "--max_gen_len", 60)
    unsplit = make_stream(flags=flags).next_batch(0)
    limit = unsplit.num_tokens // 2
    monkeypatch.setattr(rollouts_module, "MAX_CPU_TOKENS", limit)
    split = make_stream(flags=flags).next_batch(0)
    assert len(unsplit.micro_batches) == 1 < len(split.micro_batches)
    assert all(int(batch["attention_mask"].sum()) <= limit for batch in split.micro_batches)
    trained = [sorted(zip(*(torch.cat([batch[name] for batch in parts]).tolist()
                            for name in ("targets", "rollout_logprobs", "advantage")), strict=True))
               for parts in (unsplit.micro_batches, split.micro_batches)]
    assert trained[0] == trained[1] and split.num_items == unsplit.num_items


def test_batches_of_any_size_share_the_graphs_of_the_first():
    torch._dynamo.reset()
    counters.clear()
    rollouts = make_stream(flags=("--use_compile", 1))
    for layer in rollouts.model.model.layers:
        layer.compile(dynamic=False, backend="aot_eager")
    graphs, sizes = [], set()
    for number in range(3):
        for batch in rollouts.next_batch(number).micro_batches:
            losses.policy_loss(rollouts.model, batch, "grpo", 0.2, 0.2, 0.0, 0.0, 1.0).loss_sum.backward()
            sizes |= {len(batch["expand_index"]), len(batch["cu_seqlens"])}
            graphs.append(counters["stats"]["unique_graphs"])
    assert len(sizes) > 3 and len(set(graphs)) == 1, graphs


def test_groups_that_teach_nothing_are_counted_and_drawn_again():
    class Often(Seeded):
        def score(self, prompts, trajectories):
            scores = super().score(prompts, trajectories)
            return scores * torch.tensor([[int(p.source[-1]) % 2] for p in prompts])  # half of the prompts: all 0

    rollouts = make_stream(rewards=Often(), flags=("--batch_size", 5))
    assert 0.2 < rollouts.next_batch(0).metrics["alike"] < 0.8 and rollouts.cursor == 10
    rollouts = make_stream(rewards=Often(), flags=("--resample", 1))
    step = rollouts.next_batch(0)
    assert rollouts.cursor > 4 and step.num_items == 12
    assert all(int(batch["advantage"].count_nonzero()) == len(batch["advantage"]) for batch in step.micro_batches)


def test_learning_from_a_rollout_ends_when_the_policy_has_moved_too_far():
    rollouts = make_stream(flags=("--update_epochs", 4, "--target_kl", 0.01))
    moved = rollouts.track_kl(lambda *_: losses.Loss(torch.zeros(()), metrics={"approx_kl": torch.tensor(1000.0)}))
    rollouts.next_batch(0)
    assert not rollouts.can_checkpoint
    rollouts.next_batch(1)
    assert rollouts.rollouts == 1
    moved(None, {})
    assert rollouts.can_checkpoint  # at once, so that a run can save, stop and end
    rollouts.next_batch(2)
    assert rollouts.rollouts == 2


def test_an_answer_is_shown_in_the_colours_of_its_advantages():
    batch = {"document": torch.tensor([0, 1, 1]), "targets": torch.tensor([50, 60, EOS]),
             "advantage": torch.tensor([9.0, 1.0, -1.0])}
    shown = colorize_advantages(TOKENIZER, batch, 1)
    assert shown.startswith("+0.00") and "\x1b[48;2;0;120;0m" in shown and "\x1b[48;2;120;0;0m<|im_end|>" in shown


def test_scoring_computes_logits_of_answers_only_and_of_a_few_rows_at_a_time():
    sizes = []
    for prompts in (2, 8):
        rollouts = make_stream(flags=("--accumulation_steps", prompts // 2, "--mini_batches", 2))
        head = rollouts.model.lm_head
        head.register_forward_hook(lambda _, __, logits: sizes.append(logits.numel()))
        rollouts.next_batch(0)
    assert max(sizes) <= 2 * 48 * 6400  # batch_size rows, however many answers there are


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_drop_the_placeholder_and_ask_for_thinking_by_ratio(data):
    for ratio in (0.0, 0.5, 1.0):
        prompts = PromptDataset(data / "rlaif.jsonl", TOKENIZER, 64, thinking_ratio=ratio)
        assert len(prompts) == 40 and all(prompt.messages[-1]["role"] == "user" for prompt in prompts.prompts)
        assert abs(sum(prompt.thinking for prompt in prompts.prompts) / 40 - ratio) < 0.25
    assert prompts[0].ids == TOKENIZER.prompt(prompts[0].messages, open_thinking=True)
    assert len(prompts[0].ground_truth) == 1


@pytest.mark.parametrize("line, words", [
    ('{"conversations": []}', "one message or more"),
    ('{"conversations": [{"role": "user", "content": "?"}], "gt": "5"}', "gt must be"),
    ("{", "JSON"), ('{"conversations": [{"role": "boss", "content": "?"}]}', "boss")])
def test_a_bad_prompt_is_told_with_its_line(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"conversations": [{"role": "user", "content": "?"}]}\n' + line + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{words}"):
        PromptDataset(path, TOKENIZER, 64)
    assert len(PromptDataset(path, TOKENIZER, 64, skip_bad_rows=True)) == 1
    assert parse_ground_truth({"gt": None}) == parse_ground_truth({}) == parse_ground_truth({"gt": ""}) == []
    assert parse_ground_truth({"gt": '["42", 7]'}) == ["42", "7"]  # a cell of a csv file
    assert parse_ground_truth({"gt": [0.00001, 1e16, 1.5]}) == ["0.00001", "10000000000000000", "1.5"]
    with pytest.raises(UserError, match="too long"):
        PromptDataset(path, TOKENIZER, 3, skip_bad_rows=True)


# -- the stages --------------------------------------------------------------------------------------------------------

RL = {"from_weight": "full_sft", "max_gen_len": 8, "num_generations": 3, "accumulation_steps": 1, "batch_size": 4,
      "learning_rate": 1e-3, "warmup_ratio": 0, "thinking_ratio": 0.5, "max_steps": 4}
STAGES = [(train_grpo, "grpo", {"loss_type": "grpo", "beta": 0.1, "mini_batches": 2}),
          (train_grpo, "grpo", {"loss_type": "spo", "batch_size": 6}),
          (train_grpo, "grpo", {"loss_type": "cispo", "resample": 1, "is_cap": 2}),
          (train_ppo, "ppo_actor", {"mini_batches": 2, "update_epochs": 1, "critic_learning_rate": 1e-3})]
NAMES = ["grpo", "spo", "cispo", "ppo"]


def with_base(place, **options):
    torch.manual_seed(1)
    return place.with_base(**options)


@pytest.mark.parametrize("stage, name, flags", STAGES, ids=NAMES)
def test_a_resumed_run_ends_as_the_whole_one_to_the_bit(lab, data, stage, name, flags):
    whole, parts = with_base(lab("whole")), with_base(lab("parts"))
    flags = {"stage": stage, **RL, **flags, "val_data_path": data / "rlaif.jsonl", "eval_interval": 2}
    whole.train(**flags)
    parts.train(**{**flags, "max_steps": 2})
    parts.train(**flags, from_resume=1)
    assert parts.state(f"{name}_64")["step"] == 4
    assert parts.ended_like(whole, f"{name}_64")
    before, *log = whole.log(f"{name}_64")
    assert before["step"] == 0 and {"val_reward", "val_exact"} <= before.keys()  # what it could do before
    assert log[0]["approx_kl"] == 0 and log[0].get("kl", 0) == 0  # ratio 1, KL 0 before the first update
    assert log[0]["mismatch"] < 1e-5 and "reward_format_std" in log[0] and {"val_reward", "val_exact"} <= log[1].keys()
    assert (whole.out / f"{name}_best_64.pth").exists()


def test_a_resume_with_another_reference_is_refused(lab, capsys):
    place = with_base(lab())
    flags = {"stage": train_grpo, **RL, "max_steps": 1, "beta": 0.1}
    place.train(**flags)
    torch.manual_seed(2)
    place.with_base()  # other weights of the same name
    capsys.readouterr()
    place.fails(capsys, 2, "--from_weight full_sft: what it holds", "has changed since", **flags, from_resume=1)


def test_before_the_first_update_nothing_has_moved_in_bf16_either(lab):
    place = with_base(lab())
    place.train(stage=train_grpo, **{**RL, "max_steps": 1}, beta=0.1, dtype="bfloat16", log_interval=1)
    row = place.log("grpo_64")[-1]
    assert row["approx_kl"] <= 1e-3 and row["kl"] <= 1e-3 and row["mismatch"] < 0.05


def test_two_ranks_are_one_rank(lab, data):
    for stage, name, flags in (STAGES[0], STAGES[3]):
        one, two = (with_base(lab(f"{place}_{name}")) for place in ("one", "two"))
        flags = {"stage": stage, **RL, "global_batch_size": RL["batch_size"], **flags,
                 "val_data_path": data / "rlaif.jsonl"}
        process = two.start(launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), **flags)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0 and "on 2 x cpu" in out, err
        one.train(**flags)
        stem = f"{name}_64"
        for ours, theirs in zip(one.log(stem), two.log(stem), strict=True):
            assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert_close(two.state(stem)["model"], one.state(stem)["model"], rtol=0, atol=2e-4)


def test_a_run_is_saved_and_ends_only_once_a_whole_rollout_has_been_learned_from(lab, monkeypatch):
    place, saved = with_base(lab()), []
    monkeypatch.setattr(loop, "save_resume", lambda path, state: saved.append(state["step"]))
    place.train(train_grpo, **{**RL, "mini_batches": 2, "max_steps": 3, "save_interval": 1})
    assert saved == [2, 4]


def test_sampling_at_another_temperature_is_scored_at_that_temperature(lab):
    place = with_base(lab())
    place.train(train_grpo, **RL, temperature=0.5)
    assert max(row["mismatch"] for row in place.log("grpo_64")) < 1e-5


def test_episodes_are_constrained_in_validation_only(lab, tmp_path, monkeypatch, capsys):
    place, path, sampled, generate = with_base(lab()), tmp_path / "rows.jsonl", set(), EpisodeEngine.generate

    def recorded(engine, prompts, params):
        sampled.update((p.temperature, p.grammar is not None) for p in params)
        return generate(engine, prompts, params)

    monkeypatch.setattr(EpisodeEngine, "generate", recorded)
    offer = {"role": "system", "content": "", "tools": [{"name": "f"}]}
    rows = [{"conversations": [offer, {"role": "user", "content": "?"}], "gt": ["1"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    flags = {**RL, "stage": train_agent, "data_path": path, "max_seq_len": 128, "max_total_len": 256, "max_steps": 1,
             "constrained": 1}
    place.fails(capsys, 2, "--val_data_path", **flags)
    place.train(**flags, val_data_path=path)
    assert sampled == {(1.0, False), (0, True)}


def test_a_policy_learns_what_is_rewarded():
    """Answers that begin with an odd id: by chance a half, and nearly all after a few updates."""
    rollouts = make_stream(flags=("--max_gen_len", 2, "--batch_size", 16, "--num_generations", 4))
    rollouts.model = small_model(vocab_size=64)
    rollouts.prompts.prompts = [Prompt([40, 50], []), Prompt([50, 60, 40], [])]
    rollouts.engine = LocalRolloutEngine(rollouts.model, TOKENIZER, nullcontext())
    rollouts.rewards.names, rollouts.rewards.weights = ["odd", "short"], torch.tensor([1.0, 0.0])
    optimizer = torch.optim.AdamW(rollouts.model.parameters(), 3e-3)
    odd_rates = []
    for number in range(25):
        step = rollouts.next_batch(number)
        odd_rates.append(step.metrics["reward_odd"])
        for batch in step.micro_batches:
            loss = losses.policy_loss(rollouts.model, batch, "grpo", 0.2, 0.2, 0.0, 0.0, 1.0)
            (loss.loss_sum / step.num_items).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(odd_rates[:3]) < 0.6 and np.mean(odd_rates[-3:]) > 0.9


def test_the_critic_is_the_decoder_with_one_norm_and_starts_at_zero(lab):
    model = train_ppo.ActorCritic(small_model())
    inputs = {"input_ids": torch.randint(40, 6400, (1, 9)), "logits_indices": torch.arange(3, 9)}
    output = model(**inputs)
    assert output.logits.shape == (6, 6400) and output.value.tolist() == [0.0] * 6
    torch.nn.init.normal_(model.critic.score.weight)
    hidden = model.actor.model(inputs["input_ids"])[0][0, 3:]  # after its one norm; the blocks are still the actor's
    assert_close(model(**inputs).value, (hidden @ model.critic.score.weight[0]).detach(), check_stride=False)


@pytest.mark.parametrize("flags, words", [
    ({"num_generations": 1}, ["--num_generations 1"]), ({"temperature": 0}, ["--temperature 0"]),
    ({"mini_batches": 100}, ["100 --mini_batches"]),
    ({"loss_type": "spo", "batch_size": 1}, ["a rollout of 1 answers"]),
    ({"loss_type": "spo", "resample": 1}, ["--resample"])])
def test_what_cannot_be_learned_from_is_a_mistake(lab, capsys, flags, words):
    with_base(lab()).fails(capsys, 2, *words, stage=train_grpo, **{**RL, **flags})


def test_seeds_of_a_stage_share_a_panel(tmp_path):
    logs = [tmp_path / f"{name}_64.jsonl" for name in ("grpo_s1", "grpo_s2", "cispo_s1")]
    for log in logs:
        log.write_text('{"step": 0, "val_reward": 0.1}\n{"step": 1, "reward": 0.5, "loss": 0.0}\n')
    draw_curves(logs, tmp_path / "curves.png")
    head = (tmp_path / "curves.png").read_bytes()[16:24]  # width and height
    assert (int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")) == (2 * 550, 385)  # two panels
