"""The reward model: the decoder with a scalar head, read at the last token of a conversation."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from model.chat import PAD
from model.cli import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindModel, MiniMindPreTrainedModel


class MiniMindForSequenceClassification(MiniMindPreTrainedModel):
    """Parameter names are those of transformers' Qwen3ForSequenceClassification with one label."""

    def __init__(self, config: MiniMindConfig):
        config = copy.copy(config)
        config.tie_word_embeddings = False  # there is no output layer to tie
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
        nn.init.zeros_(self.score.weight)  # at first all rewards are equal

    @classmethod
    def from_decoder(cls, decoder: MiniMindForCausalLM, extra_layers: int = 0) -> "MiniMindForSequenceClassification":
        """A new reward model on the blocks of `decoder` and `extra_layers` more above them, copies of its first ones.

        The decoder's last layer predicts a token one position before it; only layers above can compare the prediction
        with the token. Copies: depth up-scaling (Kim et al. 2023). Raises UserError for more copies than layers.
        """
        config = copy.copy(decoder.config)
        if extra_layers > config.num_hidden_layers:
            raise UserError(f"--extra_layers {extra_layers}: they are copies, and there are only "
                            f"{config.num_hidden_layers} layers")
        config.num_hidden_layers += extra_layers
        model = cls(config)
        model.model.load_state_dict(decoder.model.state_dict(), strict=False)
        for i, extra_layer in enumerate(model.model.layers[len(decoder.model.layers):]):
            extra_layer.load_state_dict(decoder.model.layers[i].state_dict())
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                logits_indices: Tensor | None = None, **kwargs) -> MoeCausalLMOutputWithPast:
        """Rewards as `logits` [B, 1] at the last token of each row, or [M, 1] at the flat `logits_indices` [M].

        `attention_mask` [B, T] is 0 on padding. The other arguments: `MiniMindModel.forward`.
        """
        hidden, aux_loss = self.model(input_ids, attention_mask, position_ids, **kwargs)
        if logits_indices is None:
            B, T = input_ids.shape
            token_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            last_token = (token_mask * torch.arange(T, device=token_mask.device)).argmax(-1)
            logits_indices = last_token + T * torch.arange(B, device=last_token.device)
        return MoeCausalLMOutputWithPast(aux_loss=aux_loss, logits=self.score(hidden.flatten(0, 1)[logits_indices]))


@torch.inference_mode()
def score_conversations(model: MiniMindForSequenceClassification, conversations: list[list[int]],
                        batch_size: int = 32) -> Tensor:
    """Rewards [conversations] fp32 of conversations given as ids up to the `<|im_end|>` of their last answer."""
    by_length = sorted(range(len(conversations)), key=lambda i: len(conversations[i]))
    rewards = torch.empty(len(conversations))
    for start in range(0, len(conversations), batch_size):
        indices = by_length[start:start + batch_size]
        rows = [torch.tensor(conversations[i]) for i in indices]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        rewards[indices] = model(input_ids.to(model.device), attention_mask.to(model.device)).logits[:, 0].float().cpu()
    return rewards
