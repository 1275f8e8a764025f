"""How good each exit layer of a trained model is, as a table, a picture and a sentence."""

from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel

from self_speculation.measuring.colours import BLUE, VERMILION
from self_speculation.training.exit_measures import MEASURES, exit_metrics, scoring
from self_speculation.training.labels import num_labels


def exit_table(metrics: dict[str, float], num_layers: int, prefix: str = "") -> pd.DataFrame:
    """A row for each exit layer from `exit_metrics`, whose names may have got a prefix."""
    return pd.DataFrame(
        {"exit_layer": exit_layer} | {name: metrics[f"{prefix}exit_{exit_layer}_{name}"] for name in MEASURES}
        for exit_layer in range(1, num_layers + 1)
    )


@torch.inference_mode()
def evaluate_exits(model: PreTrainedModel, blocks: Dataset, batch_size: int) -> pd.DataFrame:
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


def exit_summary(table: pd.DataFrame) -> str:
    """The last layer's loss and perplexity, and every exit's agreement with it, in a line."""
    last, agreements = table.iloc[-1], " ".join(f"{agreement:.2f}" for agreement in table["agreement"])
    return f"Loss {last['loss']:.3f} (perplexity {last['perplexity']:.2f}), agreement by exit layer {agreements}"


def save_exits(table: pd.DataFrame, folder: Path) -> None:
    """Write the table and its picture, `exits.csv` and `exits.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "exits.csv", index=False)
    plot_exits(table, folder / "exits.png")


def plot_exits(table: pd.DataFrame, path: Path) -> None:
    """A picture of `evaluate_exits`: loss and agreement with the last layer over the exit layer."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(table["exit_layer"], table["loss"], marker="o", color=VERMILION)
    left.set(xlabel="exit layer", ylabel="loss (nats per token)", title="Loss on held-out text")
    right.plot(table["exit_layer"], table["agreement"], marker="o", color=BLUE)
    right.set(xlabel="exit layer", ylabel="share of tokens", ylim=(0, 1.02), title="Agreement with the last layer")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
