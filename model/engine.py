"""THE inference engine: KV cache, prefill, sampling. Chat, evaluation and everything that samples uses it.

Prompts of different lengths share a batch: each row writes its keys at its own positions, and sees only what is at or
before them, so what a row answers does not depend on its neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.chat import EOS, PAD
from model.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; the same seed draws the same tokens."""

    max_new_tokens: int = 512
    temperature: float = 0.85
    top_p: float = 0.95
    seed: int = 0
    stop_ids: tuple[int, ...] = (EOS, PAD)


class KVCache:
    """Keys and values of B rows up to `length` positions, allocated once: [layers, B, length, kv_heads, head_dim]."""

    def __init__(self, config, rows: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self._row = torch.arange(rows, device=device)[:, None]

    def place(self, positions: Tensor, seen: int) -> Tensor:
        """Say where the next tokens go, `positions` [B, T], all below `seen`. → their mask [B, 1, T, seen]."""
        self._positions, self._seen = positions, seen
        return (torch.arange(seen, device=positions.device) <= positions[..., None])[:, None]

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, kv_heads, T, D] of a layer; → all keys and values it may see [B, kv_heads, seen, D]."""
        stored = []
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            memory[self._row[:len(new)], self._positions] = new.transpose(1, 2).to(memory.dtype)
            stored.append(memory[:len(new), :self._seen].transpose(1, 2))
        return stored[0], stored[1]


def next_tokens(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw one token a row from logits [B, V]: temperature, then the fewest tokens of mass `top_p` (Holtzman 2020)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probability = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probability.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= max(sampling.top_p, 1e-6), 0)  # the first stays
        probability = torch.zeros_like(probability).scatter(-1, order, ordered)
    return torch.cat([torch.multinomial(row, 1, generator=generator)
                      for row, generator in zip(probability, generators, strict=True)])


@torch.inference_mode()
def stream(model: nn.Module, prompts: list[list[int]], sampling: Sampling,
           numbers: list[int] | None = None) -> Iterator[list[int | None]]:
    """Continue all prompts together: each item is the next token of every row, None where a row has ended.

    The stop token is yielded too. Row r draws with seed + numbers[r], by default r, so that equal prompts differ.
    Raises UserError when a prompt is longer than the model's positions.
    """
    config, device = model.config, model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(len(prompt) for prompt in prompts)
    if longest + 1 > config.max_position_embeddings:
        raise UserError(f"a prompt of {longest:,} tokens leaves no room for an answer in the model's "
                        f"{config.max_position_embeddings:,} positions")
    room = min(longest + sampling.max_new_tokens, config.max_position_embeddings)
    cache = KVCache(config, len(prompts), room, device, model.dtype)
    generators = [torch.Generator(device).manual_seed(sampling.seed + n) for n in numbers or range(len(prompts))]

    ids = torch.tensor([prompt + [PAD] * (longest - len(prompt)) for prompt in prompts], device=device)
    positions = torch.arange(longest, device=device).expand_as(ids)  # padding is overwritten before it is ever seen
    ends = torch.arange(len(prompts), device=device) * longest + lengths - 1
    alive = [True] * len(prompts)
    for seen in range(longest, room + 1):
        mask = cache.place(positions, seen)
        logits = model(ids, mask, positions, cache, logits_at=ends).logits
        chosen = next_tokens(logits, sampling, generators)
        tokens = chosen.tolist()
        yield [token if going else None for token, going in zip(tokens, alive, strict=True)]
        alive = [going and token not in sampling.stop_ids for token, going in zip(tokens, alive, strict=True)]
        if not any(alive) or seen - longest + 1 == sampling.max_new_tokens:
            return
        ids, positions, ends = chosen[:, None], lengths[:, None], torch.arange(len(prompts), device=device)
        lengths = lengths + 1


def generate(model: nn.Module, prompts: list[list[int]], sampling: Sampling, batch_size: int = 64) -> list[list[int]]:
    """The whole answers, without their stop tokens, `batch_size` prompts of similar length at a time.

    Prompt i draws with seed + i, whatever shares its batch.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for begin in range(0, len(prompts), batch_size):
        rows = by_length[begin:begin + batch_size]
        for tokens in stream(model, [prompts[i] for i in rows], sampling, rows):
            for i, token in zip(rows, tokens, strict=True):
                if token is not None and token not in sampling.stop_ids:
                    answers[i].append(token)
    return answers
