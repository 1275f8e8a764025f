"""How good each exit layer is: loss, perplexity, next-token accuracy, and agreement with the last layer.

Shapes: B batch, T positions, D hidden size, V vocabulary, N = B·T rows or a chunk of them, E exit layers 1 … L,
M the measures: summed cross-entropy in nats, correct tokens, tokens on which exit and last layer agree.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import EvalPrediction, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from self_speculation.training.early_exit_loss import CHUNK_TOKENS, IGNORED_LABEL

MEASURES = ("loss", "perplexity", "accuracy", "agreement")


def exit_sums(model: LlamaForCausalLM, hidden_states: tuple[Tensor, ...], labels_BT: Tensor, chunk: int) -> Tensor:
    """Sums of the measures over each row's labelled tokens, (B, E, M); `chunk` positions' logits live at a time.

    `hidden_states` are x_0 … x_L as transformers returns them, each (B, T, D), x_L already normed.
    """
    labels_N = F.pad(labels_BT, (0, 1), value=IGNORED_LABEL)[:, 1:].flatten()
    chunks = zip(*(state_BTD.flatten(0, 1).split(chunk) for state_BTD in hidden_states[1:]), strict=True)
    measures_NEM = [
        _chunk_measures(model, states, own_N) for states, own_N in zip(chunks, labels_N.split(chunk), strict=True)
    ]
    return torch.cat(measures_NEM).unflatten(0, labels_BT.shape).sum(1)


def _chunk_measures(model: LlamaForCausalLM, states: tuple[Tensor, ...], labels_N: Tensor) -> Tensor:
    """The measures of every exit at some positions, zero where there is no label, (N, E, M)."""
    *early, last_ND = states
    is_labelled_N = labels_N != IGNORED_LABEL
    last_NV = model.lm_head(last_ND)
    last_N = last_NV.argmax(-1)
    measures_ENM = []
    for logits_NV in (*(model.lm_head(model.model.norm(state_ND)) for state_ND in early), last_NV):
        loss_N = F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED_LABEL, reduction="none")
        guess_N = logits_NV.argmax(-1)
        agrees_N = (guess_N == last_N) & is_labelled_N
        measures_ENM.append(torch.stack([loss_N, guess_N == labels_N, agrees_N], dim=-1))
    return torch.stack(measures_ENM, dim=1).double()


@contextmanager
def scoring(model: LlamaForCausalLM, chunk: int = CHUNK_TOKENS) -> Iterator[None]:
    """For as long as it lasts, the model's `forward` returns `exit_sums` in the place of logits.

    Inside `forward`, because DDP and FSDP prepare the shared norm and head around that call.
    """
    before = model.__dict__.get("forward")

    @wraps(model.forward)
    def forward_scores(*args: Any, labels: Tensor, **kwargs: Any) -> CausalLMOutput:
        kwargs |= {"output_hidden_states": True, "use_cache": False}
        hidden_states = model.model(*args, **kwargs).hidden_states
        return CausalLMOutput(logits=exit_sums(model, hidden_states, labels, chunk))

    model.forward = forward_scores
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def num_labels(labels_BT: Tensor) -> Tensor:
    """Tokens of each row that are to be predicted, (B)."""
    return (labels_BT[:, 1:] != IGNORED_LABEL).sum(1)


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


def exit_table(metrics: dict[str, float], num_layers: int, prefix: str = "") -> pd.DataFrame:
    """A row for each exit layer from `exit_metrics`, whose names may have got a prefix."""
    return pd.DataFrame(
        {"exit_layer": exit_layer} | {name: metrics[f"{prefix}exit_{exit_layer}_{name}"] for name in MEASURES}
        for exit_layer in range(1, num_layers + 1)
    )


@torch.inference_mode()
def evaluate_exits(model: LlamaForCausalLM, blocks: Dataset, batch_size: int) -> pd.DataFrame:
    """Loss (nats per token), perplexity, accuracy and agreement of every exit layer on held-out blocks."""
    model.eval()
    sums, counts = [], []
    with scoring(model):
        for batch in tqdm(
            DataLoader(blocks, batch_size=batch_size), desc="Evaluating exits", unit="batch", leave=False
        ):
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            sums.append(model(**on_device).logits.cpu())
            counts.append(num_labels(batch["labels"]))
    prediction = EvalPrediction(torch.cat(sums).numpy(), torch.cat(counts).numpy())
    return exit_table(exit_metrics(prediction), model.config.num_hidden_layers)


def plot_exits(table: pd.DataFrame, path: Path) -> None:
    """A picture of `evaluate_exits`: loss and agreement with the last layer over the exit layer."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(table["exit_layer"], table["loss"], marker="o", color="tab:red")
    left.set(xlabel="exit layer", ylabel="loss (nats per token)", title="Loss on held-out text")
    right.plot(table["exit_layer"], table["agreement"], marker="o", color="tab:blue")
    right.set(xlabel="exit layer", ylabel="share of tokens", ylim=(0, 1.02), title="Agreement with the last layer")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
