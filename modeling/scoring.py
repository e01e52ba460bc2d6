"""Scores of a discriminator for many sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .policy import inference


def score(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, batch_size: int = 64
) -> Tensor:
    """
    Score whole sequences in batches, in evaluation mode and without a graph.

    Args:
        model (`PreTrainedModel`): a sequence classifier with one logit, such as [`MidiDiscriminator`]. Its mode is
            the same afterwards.
        input_ids (`LongTensor` of shape `(n, time)`): the sequences, on any device.
        attention_mask (`LongTensor` of shape `(n, time)`, *optional*): 0 on padding, 1 elsewhere. By default nothing
            is padding.
        batch_size (`int`, *optional*, defaults to 64): sequences per forward pass.

    Returns:
        `FloatTensor` of shape `(n,)`: the log-odds that each sequence is real, on the model's device.

    Raises:
        ValueError: if the shapes of `input_ids` and `attention_mask` differ.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit "
            f"input_ids of shape {tuple(input_ids.shape)}"
        )
    log_odds = torch.empty(len(input_ids), device=model.device)
    with inference(model):
        for start in range(0, len(input_ids), batch_size):
            part = slice(start, start + batch_size)
            mask = None if attention_mask is None else attention_mask[part].to(model.device)
            logits = model(input_ids[part].to(model.device), attention_mask=mask).logits
            log_odds[part] = logits[:, 0].float()
    return log_odds


def score_sequences(
    model: PreTrainedModel, sequences: Sequence[Sequence[int] | Tensor], pad_token_id: int, batch_size: int = 64
) -> Tensor:
    """
    The same of sequences of any lengths: those of about the same length are read together.

    Args:
        model (`PreTrainedModel`): as for [`score`].
        sequences (`Sequence[Sequence[int] | LongTensor]`): token ids, without padding, at least one each.
        pad_token_id (`int`): fills up the shorter ones of a batch, on the right, behind a mask.
        batch_size (`int`, *optional*, defaults to 64): sequences per forward pass.

    Returns:
        `FloatTensor` of shape `(n,)`: the log-odds that each sequence is real, on the model's device.
    """
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    log_odds = torch.empty(len(rows), device=model.device)
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        ids = pad_sequence([rows[place] for place in places], batch_first=True, padding_value=pad_token_id)
        lengths = torch.tensor([len(rows[place]) for place in places])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        log_odds[places] = score(model, ids, mask, batch_size)
    return log_odds


__all__ = ["score", "score_sequences"]
