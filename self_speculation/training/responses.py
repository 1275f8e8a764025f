"""What a model is finetuned on: prompts with responses, of which the responses are learnt; and batches of them."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from self_speculation.training.labels import IGNORED_LABEL
from self_speculation.training.tokenizer import end_token


class Responses(Dataset):
    """Prompts with their responses; the labels are the responses, with the end token, alone."""

    def __init__(self, pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        end = end_token(tokenizer)
        prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        responses = tokenizer([response for _, response in pairs], add_special_tokens=False)["input_ids"]
        examples = [(prompt, [*response, end]) for prompt, response in zip(prompts, responses, strict=True)]
        self.examples = [one for one in examples if len(one[0]) + len(one[1]) <= block_size]
        self.num_too_long = len(examples) - len(self.examples)
        if not self.examples:
            raise ValueError(f"No prompt with its response has at most {block_size} tokens (--block_size).")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, response = self.examples[index]
        labels = [IGNORED_LABEL] * len(prompt) + response
        return {"input_ids": torch.tensor(prompt + response), "labels": torch.tensor(labels)}

    def __str__(self) -> str:
        left_out = f" ({self.num_too_long:,} more are too long)" if self.num_too_long else ""
        return f"{len(self):,} responses{left_out}"

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token (V) occurs in the responses: those are what is drafted."""
        ids_N = torch.tensor([token for _, response in self.examples for token in response])
        return ids_N.bincount(minlength=vocab_size)

    def prompts(self, count: int) -> list[list[int]]:
        """The first prompts."""
        return [prompt for prompt, _ in self.examples[:count]]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch; shorter rows end in padding without labels, which no token before it can see."""
    return {
        name: pad_sequence(
            [item[name] for item in items],
            batch_first=True,
            padding_value=IGNORED_LABEL if name == "labels" else 0,
        )
        for name in items[0]
    }
