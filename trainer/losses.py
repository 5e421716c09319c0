"""Losses as pure functions. Each stage's `(model, batch) → Loss` and the equations below it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chat import CALL, END_CALL, END_THINK, THINK
from model.model_minimind import MiniMindForCausalLM, document_mask

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", "cu_seqlens", "logits_at")
TAGS = (THINK, END_THINK, CALL, END_CALL)


class Loss(NamedTuple):
    """What a micro-batch contributes: a sum, to be divided by the units of the whole step, and a mean."""

    total: Tensor  # summed over units (tokens, pairs, …); the loop divides by the units of all micro-batches and ranks
    mean: Tensor | None = None  # averaged over micro-batches and ranks: the load-balancing loss
    seen: dict[str, Tensor] = {}  # what else to log, summed over the same units


def balancing(model: nn.Module, aux_loss: Tensor | None) -> Tensor | None:
    """The load-balancing loss times its coefficient, None for a dense model."""
    config = getattr(model, "module", model).config
    return None if aux_loss is None else config.router_aux_loss_coef * aux_loss


def next_token_loss(model: nn.Module, batch: dict[str, Tensor], tag_weight: float = 1.0) -> Loss:
    """Σ -log p(target) over the supervised tokens: logits [M, V] are computed only where there is a label.

    A target that is a tag of thinking or of a tool call counts `tag_weight` times, and once as a token.
    """
    output = model(**{name: batch[name] for name in MODEL_INPUTS})
    logits, targets = output.logits.float(), batch["targets"]
    total = F.cross_entropy(logits, targets, reduction="sum")
    if tag_weight != 1:
        total = total + (tag_weight - 1) * F.cross_entropy(
            logits, targets.where(torch.isin(targets, targets.new_tensor(TAGS)), -100), reduction="sum")
    return Loss(total, balancing(model, output.aux_loss))


# -- distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531) -----------------------------------------------


def divergence(student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
    """KL(teacher ‖ student) of each row of logits [M, V] at `temperature`, or KL(student ‖ teacher). → [M]"""
    ours, theirs = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    if reverse:
        ours, theirs = theirs, ours
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def teacher_logits(teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits [M, V] of any decoder at `logits_at`; one of transformers' gets the documents' bounds as a mask."""
    if isinstance(teacher, MiniMindForCausalLM):
        return teacher(**{name: batch[name] for name in MODEL_INPUTS}).logits
    mask = document_mask(batch["cu_seqlens"], *batch["input_ids"].shape)
    hidden = teacher.base_model(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"],
                                use_cache=False).last_hidden_state
    return teacher.get_output_embeddings()(hidden.flatten(0, 1)[batch["logits_at"]])


def distillation_loss(model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module, alpha: float, temperature: float,
                      reverse: bool) -> Loss:
    """Σ alpha · (-log p(target)) + (1 - alpha) · T² · KL over the supervised tokens; T² keeps gradients of one size."""
    output = model(**{name: batch[name] for name in MODEL_INPUTS})
    with torch.no_grad():
        theirs = teacher_logits(teacher, batch).float()
    logits = output.logits.float()
    nats = F.cross_entropy(logits, batch["targets"], reduction="sum")
    kl = divergence(logits, theirs, temperature, reverse).sum()
    return Loss(alpha * nats + (1 - alpha) * temperature**2 * kl, balancing(model, output.aux_loss),
                {"nats": nats, "kl": kl})


# -- preferences: documents 2i and 2i + 1 of a batch are the chosen and the rejected answer of pair i ------------------

PREFERENCES = ("sigmoid", "ipo", "simpo")


def answer_log_probs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Σ log p over the answer of each document: [D], and the load-balancing loss."""
    output = model(**{name: batch[name] for name in MODEL_INPUTS})
    log_p = -F.cross_entropy(output.logits.float(), batch["targets"], reduction="none")
    return log_p.new_zeros(len(batch["ends"])).index_add(0, batch["document"], log_p), output.aux_loss


def preference_losses(chosen: Tensor, rejected: Tensor, kind: str, beta: float, label_smoothing: float = 0.0,
                      gamma: float = 0.0) -> Tensor:
    """The loss of each pair [P] from the scores of its sides [P].

    sigmoid: -log σ(β · margin), scores are Σ log(p / p_ref) (DPO, Rafailov et al. 2023, eq. 7), of which a share
    `label_smoothing` is taken for mislabelled. simpo: -log σ(β · margin - γ), scores are mean log p (Meng et al. 2024,
    eq. 6). ipo: (margin - 1 / 2β)², scores are mean log(p / p_ref) (Azar et al. 2023, eq. 17, a token as trl has it).
    """
    margin = chosen - rejected
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    z = beta * margin - (gamma if kind == "simpo" else 0.0)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def wins(margin: Tensor) -> Tensor:
    """How many of the margins are above 0; a tie is half a win."""
    return (margin.detach().sign() + 1).sum() / 2


def dpo_loss(model: nn.Module, batch: dict[str, Tensor], kind: str, beta: float, label_smoothing: float,
             gamma: float) -> Loss:
    """Σ over pairs of a preference loss; `reference` [D] holds Σ log p_ref of each document (not for simpo)."""
    log_p, aux_loss = answer_log_probs(model, batch)
    score = log_p if kind == "simpo" else log_p - batch["reference"]
    if kind != "sigmoid":
        score = score / batch["document"].bincount(minlength=len(score))
    chosen, rejected = score[0::2], score[1::2]
    losses = preference_losses(chosen, rejected, kind, beta, label_smoothing, gamma)
    return Loss(losses.sum(), balancing(model, aux_loss), {
        "accuracy": wins(chosen - rejected), "margin": beta * (chosen - rejected).sum(),
        "chosen_logp": log_p[0::2].sum(), "rejected_logp": log_p[1::2].sum()})


def reward_loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """Σ over pairs of -log σ(r(chosen) - r(rejected)) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""
    output = model(**{name: batch[name] for name in MODEL_INPUTS} | {"logits_at": batch["ends"]})
    reward = output.logits.float()[:, 0]
    margin = reward[0::2] - reward[1::2]
    return Loss(-F.logsigmoid(margin).sum(), balancing(model, output.aux_loss),
                {"accuracy": wins(margin), "margin": margin.sum()})
