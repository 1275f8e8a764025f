"""What is said of a model whose weights are finite and whose logits are not: in 16 bits, numbers may overflow."""

from transformers import PreTrainedModel


def overflown(model: PreTrainedModel) -> ValueError:
    """The error of logits that are NaN or infinite, from which no token can be chosen."""
    dtype = str(model.dtype).removeprefix("torch.")
    return ValueError(
        f"--model {model.name_or_path}: its logits are NaN or infinite in {dtype}; a wider --dtype may hold them, "
        "or the checkpoint's weights are too large."
    )
