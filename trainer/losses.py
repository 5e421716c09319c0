"""Losses as pure functions: of each stage `(model, batch) → Loss`, and the equations it is made of."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import BatchLayout, document_mask
from model.chat import CALL, END_CALL, END_THINK, THINK
from model.model_minimind import MiniMindForCausalLM

TAG_TOKENS = (THINK, END_THINK, CALL, END_CALL)
PREFERENCE_LOSSES = ("sigmoid", "ipo", "simpo")


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch: ids, positions, where logits are needed, and the layout of the documents."""
    if "expand_index" in batch:  # the number of documents differs from batch to batch: one graph for all
        for name in ("expand_index", "cu_seqlens"):
            torch._dynamo.maybe_mark_dynamic(batch[name], 0)
    bounds = {name: batch[name] for name in ("cu_seqlens", "expand_index", "gather_index") if name in batch}
    return {"layout": BatchLayout(token_mask=batch["attention_mask"], **bounds)} | \
        {name: batch[name] for name in ("input_ids", "position_ids", "logits_indices")}


class Loss(NamedTuple):
    """What a micro-batch contributes: a sum, to be divided by the items of the whole step, and a mean."""

    loss_sum: Tensor  # over items (tokens, pairs, …); the loop divides by the items of all micro-batches and ranks
    aux_loss: Tensor | None = None  # averaged over micro-batches and ranks: the load-balancing loss
    metrics: dict[str, Tensor] = {}  # what else to log, summed over the same items


def aux_loss_term(model: nn.Module, aux_loss: Tensor | None) -> Tensor | None:
    """The load-balancing loss times its coefficient, None for a dense model."""
    config = getattr(model, "module", model).config
    return None if aux_loss is None else config.router_aux_loss_coef * aux_loss


def next_token_loss(model: nn.Module, batch: dict[str, Tensor], tag_weight: float = 1.0) -> Loss:
    """Σ -log p(target) over the supervised tokens; logits [M, V] are computed only where there is a target.

    A target that opens or closes thinking or a tool call is weighted by `tag_weight`, but counts as one token.
    """
    output = model(**model_inputs(batch))
    logits, targets = output.logits.float(), batch["targets"]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    if tag_weight != 1:
        is_tag = torch.stack([targets == token for token in TAG_TOKENS]).any(0)  # isin would wait for the device
        tags = targets.where(is_tag, -100)
        loss = loss + (tag_weight - 1) * F.cross_entropy(logits, tags, reduction="sum")
    return Loss(loss, aux_loss_term(model, output.aux_loss))


# -- distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531) -----------------------------------------------


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
    """KL(teacher ‖ student) at `temperature`, or if `reverse` KL(student ‖ teacher), of logits [M, V] → [M]."""
    log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    if reverse:
        log_q, log_p = log_p, log_q
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # Σ p · (log p - log q)


def teacher_logits(teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits [M, V] of any decoder at `logits_indices`; transformers' decoders take the documents' bounds as a mask."""
    if isinstance(teacher, MiniMindForCausalLM):
        return teacher(**model_inputs(batch)).logits
    mask = document_mask(batch["cu_seqlens"], *batch["input_ids"].shape)
    hidden = teacher.base_model(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"],
                                use_cache=False).last_hidden_state
    return teacher.get_output_embeddings()(hidden.flatten(0, 1)[batch["logits_indices"]])


def distillation_loss(model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module, alpha: float, temperature: float,
                      reverse: bool) -> Loss:
    """Σ α·(-log p(target)) + (1 - α)·T²·KL over the supervised tokens; T² offsets gradients that shrink as 1 / T²."""
    output = model(**model_inputs(batch))
    with torch.no_grad():
        target_logits = teacher_logits(teacher, batch).float()
    logits = output.logits.float()
    nats = F.cross_entropy(logits, batch["targets"], reduction="sum")
    kl = kl_divergence(logits, target_logits, temperature, reverse).sum()
    return Loss(alpha * nats + (1 - alpha) * temperature**2 * kl, aux_loss_term(model, output.aux_loss),
                {"nats": nats, "kl": kl})


# -- preferences: documents 2i and 2i + 1 of a batch are the chosen and the rejected answer of pair i ------------------


def answer_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """log p(answer) = Σ_t log p(y_t) of each document [D], and the load-balancing loss."""
    output = model(**model_inputs(batch))
    log_p = -F.cross_entropy(output.logits.float(), batch["targets"], reduction="none")
    return log_p.new_zeros(len(batch["ends"])).index_add(0, batch["document"], log_p), output.aux_loss


def preference_losses(chosen: Tensor, rejected: Tensor, loss_type: str, beta: float, label_smoothing: float = 0.0,
                      gamma: float = 0.0) -> Tensor:
    """The loss of each pair [P] from the scores [P] of its two answers, margin = chosen - rejected.

    sigmoid: -log σ(β·margin), scores are log(p / p_ref) (DPO, Rafailov et al. 2023, eq. 7); a share `label_smoothing`
      of the pairs is taken to be mislabelled.
    simpo: -log σ(β·margin - γ), scores are log p per token (Meng et al. 2024, eq. 6).
    ipo: (margin - 1 / 2β)², scores are log(p / p_ref) per token, as in trl (Azar et al. 2023, eq. 17).
    """
    margin = chosen - rejected
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    logits = beta * margin - (gamma if loss_type == "simpo" else 0.0)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def num_wins(margin: Tensor) -> Tensor:
    """How many of the margins are above 0; a tie is half a win."""
    return (margin.detach().sign() + 1).sum() / 2


def dpo_loss(model: nn.Module, batch: dict[str, Tensor], loss_type: str, beta: float, label_smoothing: float,
             gamma: float) -> Loss:
    """Σ over pairs of a preference loss; `ref_logprobs` [D] of the batch: log p_ref of each answer (not for simpo)."""
    log_p, aux_loss = answer_log_probs(model, batch)
    score = log_p if loss_type == "simpo" else log_p - batch["ref_logprobs"]
    if loss_type != "sigmoid":
        ones = torch.ones_like(batch["document"], dtype=score.dtype)  # bincount would wait for the device
        score = score / torch.zeros_like(score).index_add(0, batch["document"], ones)
    chosen, rejected = score[0::2], score[1::2]
    losses = preference_losses(chosen, rejected, loss_type, beta, label_smoothing, gamma)
    return Loss(losses.sum(), aux_loss_term(model, aux_loss), {
        "accuracy": num_wins(chosen - rejected), "margin": beta * (chosen - rejected).sum(),
        "chosen_logp": log_p[0::2].sum(), "rejected_logp": log_p[1::2].sum()})


def reward_loss(model: nn.Module, batch: dict[str, Tensor], token_weight: float = 0.0) -> Loss:
    """Σ over pairs of -log σ(r(chosen) - r(rejected)) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1).

    `token_weight` adds the same loss on r = Σ_t r(y_t), the sum of the rewards of an answer's tokens (Christiano et al.
    2017, eq. 1), from which the model learns where a long answer goes wrong.
    """
    ends = batch["ends"]
    indices = torch.cat((ends, batch["token_at"])) if token_weight else ends
    output = model(**model_inputs(batch) | {"logits_indices": indices})
    reward, token_rewards = output.logits.float()[:, 0].split((len(ends), len(output.logits) - len(ends)))
    margin = reward[0::2] - reward[1::2]
    loss = -F.logsigmoid(margin).sum()
    if token_weight:
        sums = torch.zeros_like(reward).index_add(0, batch["document"], token_rewards)
        loss = loss - token_weight * F.logsigmoid(sums[0::2] - sums[1::2]).sum()
    return Loss(loss, aux_loss_term(model, output.aux_loss), {"accuracy": num_wins(margin), "margin": margin.sum()})


# -- policy gradients: make sampled tokens more or less likely, in proportion to their advantage -----------------------
# Per token of a batch [M]: `advantage`, `weight` (1, or 1 / length to average over sequences) and `rollout_logprobs`,
# the log-probability the sampler gave it; where needed `old_logprobs`, of the policy before this rollout's updates, and
# `ref_logprobs`, of the reference. All at the temperature of sampling, over the whole vocabulary.


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log p of each target [M] under softmax(logits / temperature), logits [M, V]."""
    return -F.cross_entropy(logits.float() / temperature, targets, reduction="none")


def kl_k3(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q/p - log(q/p) - 1 ≥ 0: unbiased estimate of KL(p ‖ q) from samples of p (Schulman 2020, "k3"). → [M]"""
    log_ratio = log_q - log_p
    return log_ratio.exp() - log_ratio - 1


def policy_losses(new: Tensor, old: Tensor, advantage: Tensor, loss_type: str, clip_low: float, clip_high: float,
                  document: Tensor | None = None) -> Tensor:
    """The loss of each sampled token [M] from its log-probabilities now and before the update; ρ = exp(new - old).

    grpo, spo, ppo: -min(ρ·A, clip(ρ, 1 - clip_low, 1 + clip_high)·A) (Schulman et al. 2017, eq. 7; with two bounds:
      DAPO, Yu et al. 2025, eq. 8).
    gspo: the same, where ρ is the geometric mean over its sequence, `document` [M] (Zheng et al. 2025, eq. 5-7).
    cispo: -sg(min(ρ, clip_high))·A·new; the weight is clipped, so no token loses its gradient (MiniMax 2025, eq. 4-5).
    """
    ratio = policy_ratio(new, old, loss_type, document)
    if loss_type == "cispo":
        return -ratio.clamp(max=clip_high).detach() * advantage * new
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def policy_ratio(new: Tensor, old: Tensor, loss_type: str, document: Tensor) -> Tensor:
    """π / π_old of each token [M]; with gspo the geometric mean over its answer."""
    log_ratio = new - old
    if loss_type == "gspo":
        total, count = (x.new_zeros(len(x)).index_add(0, document, x) for x in (log_ratio, torch.ones_like(log_ratio)))
        log_ratio = (total / count)[document]
    return log_ratio.exp()


def policy_objective(new: Tensor, batch: dict[str, Tensor], loss_type: str, clip_low: float, clip_high: float,
                     beta: float, tis_cap: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ weight · (policy loss + beta · KL to the reference) from the log-probabilities `new` [M], and metrics.

    Without `old_logprobs` the policy has not been updated since it sampled, so old is new. `tis_cap`: truncated
    importance sampling; the policy loss is multiplied by min(π_old / π_sampler, tis_cap), which corrects for the
    sampler's rounding (Yao et al. 2025). 0 turns it off.
    """
    old, weight = batch.get("old_logprobs", new.detach()), batch["weight"]
    losses = policy_losses(new, old, batch["advantage"], loss_type, clip_low, clip_high, batch["document"])
    log_mismatch = old - batch["rollout_logprobs"]
    if tis_cap:
        losses = losses * log_mismatch.exp().clamp(max=tis_cap)
    ratio = policy_ratio(new.detach(), old, loss_type, batch["document"])
    is_clipped = ratio > clip_high if loss_type == "cispo" else (ratio > 1 + clip_high) | (ratio < 1 - clip_low)
    metrics = {"entropy": -weight * new.detach(), "mismatch": weight * log_mismatch.abs(),
               "approx_kl": weight * kl_k3(old, new.detach()), "clipped": weight * is_clipped}
    if "ref_logprobs" in batch:
        kl = kl_k3(new, batch["ref_logprobs"])
        losses = losses + beta * kl
        metrics["kl"] = weight * kl.detach()
    return (weight * losses).sum(), {name: value.sum() for name, value in metrics.items()}


def policy_loss(model: nn.Module, batch: dict[str, Tensor], loss_type: str, clip_low: float, clip_high: float,
                beta: float, tis_cap: float, temperature: float) -> Loss:
    """`policy_objective` of the sampled tokens of a batch."""
    output = model(**model_inputs(batch))
    new = token_log_probs(output.logits, batch["targets"], temperature)
    objective, metrics = policy_objective(new, batch, loss_type, clip_low, clip_high, beta, tis_cap)
    return Loss(objective, aux_loss_term(model, output.aux_loss), metrics)


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (clip(V, V_old ± clip) - R)²) of each token [M], as in OpenAI's baselines; clip 0: ½ (V - R)²."""
    losses = (values - returns) ** 2
    if clip:
        losses = torch.maximum(losses, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return losses / 2


def ppo_loss(model: nn.Module, batch: dict[str, Tensor], epsilon: float, value_clip: float, value_coef: float,
             tis_cap: float, temperature: float) -> Loss:
    """PPO of an actor and its critic (Schulman et al. 2017, eq. 9): Σ policy loss + value_coef · value loss.

    Of each token [M], `model` gives logits and a value; `value` of the batch was the critic's before the update,
    `returns` is its target. The KL to the reference is part of the rewards, so here it is only logged.
    """
    output = model(**model_inputs(batch))
    new = token_log_probs(output.logits, batch["targets"], temperature)
    objective, metrics = policy_objective(new, batch, "ppo", epsilon, epsilon, 0.0, tis_cap)
    value_loss = (batch["weight"] * value_losses(output.value, batch["value"], batch["returns"], value_clip)).sum()
    metrics["value_loss"] = value_loss.detach()
    return Loss(objective + value_coef * value_loss, aux_loss_term(model, output.aux_loss), metrics)
