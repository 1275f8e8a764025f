"""How good each exit layer is: loss, perplexity, next-token accuracy, and agreement with the last layer.

Shapes: B batch, T positions, D hidden size, V vocabulary, N = B·T rows or a chunk of them, E exit layers 1 … L,
M the measures: summed cross-entropy in nats, correct tokens, tokens on which exit and last layer agree.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from self_speculation.exit_adapter import exit_norm
from self_speculation.training.choices import CHUNK_TOKENS
from self_speculation.training.early_exit_loss import exit_logits, head_logits
from self_speculation.training.exit_adapter_loss import running_adapter
from self_speculation.training.labels import IGNORED_LABEL, next_labels

MEASURES = ("loss", "perplexity", "accuracy", "agreement")


def exit_sums(model: PreTrainedModel, hidden_states: tuple[Tensor, ...], labels_BT: Tensor, chunk: int) -> Tensor:
    """Sums of the measures over each row's labelled tokens, (B, E, M); `chunk` positions' logits live at a time.

    `hidden_states` are x_0 … x_L as transformers returns them, each (B, T, D), x_L already normed; at an exit with an
    adapter, what left the adapter's layer.
    """
    labels_N = next_labels(labels_BT)
    chunks = zip(*(state_BTD.flatten(0, 1).split(chunk) for state_BTD in hidden_states[1:]), strict=True)
    measures_NEM = [
        _chunk_measures(model, states, own_N) for states, own_N in zip(chunks, labels_N.split(chunk), strict=True)
    ]
    return torch.cat(measures_NEM).unflatten(0, labels_BT.shape).sum(1)


def _chunk_measures(model: PreTrainedModel, states: tuple[Tensor, ...], labels_N: Tensor) -> Tensor:
    """The measures of every exit at some positions, zero where there is no label, (N, E, M)."""
    *early, last_ND = states
    is_labelled_N = labels_N != IGNORED_LABEL
    last_NV = exit_logits(model, last_ND, is_normed=True)
    last_N = last_NV.argmax(-1)
    measures_ENM = []
    normed_ND = (exit_norm(model, exit_layer)(state_ND) for exit_layer, state_ND in enumerate(early, 1))
    early_NV = (head_logits(model, own_ND) for own_ND in normed_ND)
    for logits_NV in (*early_NV, last_NV):
        loss_N = F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED_LABEL, reduction="none")
        guess_N = logits_NV.argmax(-1)
        agrees_N = (guess_N == last_N) & is_labelled_N
        measures_ENM.append(torch.stack([loss_N, guess_N == labels_N, agrees_N], dim=-1))
    return torch.stack(measures_ENM, dim=1).double()


@contextmanager
def scoring(model: PreTrainedModel, chunk: int = CHUNK_TOKENS) -> Iterator[None]:
    """For as long as it lasts, the model's `forward` returns `exit_sums` in the place of logits.

    Inside `forward`, because DDP and FSDP prepare the shared norm and head around that call.
    """
    before = model.__dict__.get("forward")

    @wraps(model.forward)
    def forward_scores(*args: Any, labels: Tensor, **kwargs: Any) -> CausalLMOutput:
        kwargs |= {"output_hidden_states": True, "use_cache": False}
        with running_adapter(model) as left_BTD:
            hidden_states = model.model(*args, **kwargs).hidden_states
        hidden_states = tuple(left_BTD.get(layer, state_BTD) for layer, state_BTD in enumerate(hidden_states))
        return CausalLMOutput(logits=exit_sums(model, hidden_states, labels, chunk))

    model.forward = forward_scores
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def exit_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The measures of the last layer, and of every exit, from rows' `exit_sums` and `num_labels`."""
    means_EM = np.sum(prediction.predictions, axis=0) / np.sum(prediction.label_ids)
    metrics: dict[str, float] = {}
    for exit_layer, (loss, accuracy, agreement) in enumerate(means_EM.tolist(), 1):
        own = dict(zip(MEASURES, (loss, _perplexity(loss), accuracy, agreement), strict=True))
        metrics |= {f"exit_{exit_layer}_{name}": value for name, value in own.items()}
    # The last one's.
    return metrics | {name: own[name] for name in MEASURES[:-1]}


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
