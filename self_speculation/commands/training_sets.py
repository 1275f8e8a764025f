"""From what is read to what is trained on: texts become blocks of tokens, prompts with responses become sequences."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.example import Example
from self_speculation.prompts.fitting import response_pairs
from self_speculation.prompts.sources import Examples, Stream, Texts
from self_speculation.training.packing import PackedTexts, Packing, StreamedTexts
from self_speculation.training.responses import Responses

# The sequences to train on, and those to evaluate on.
TrainingSets = tuple[PackedTexts | StreamedTexts | Responses, PackedTexts | Responses]


@dataclass(frozen=True)
class Sizes:
    """Tokens in a training sequence, held-out sequences, and how texts become sequences."""

    block_size: int
    eval_blocks: int
    packing: Packing


def training_sets(source: Texts | Stream | Examples, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> TrainingSets:
    """The sequences to train on, and those to evaluate on."""
    if isinstance(source, Examples):
        held_out = source.held_out[: sizes.eval_blocks]
        return _responses(source.training, tokenizer, sizes), _responses(held_out, tokenizer, sizes)
    training: PackedTexts | StreamedTexts
    if isinstance(source, Stream):
        training = StreamedTexts(source.training, tokenizer, sizes.block_size, sizes.packing.separate)
    else:
        training = PackedTexts(source.training, tokenizer, sizes.block_size, packing=sizes.packing)
    return training, PackedTexts(source.held_out, tokenizer, sizes.block_size, sizes.eval_blocks, sizes.packing)


def all_texts(source: Texts | Stream | Examples) -> Iterator[str]:
    """All that is read, one after the other, by which it can be known again; of a stream the beginning."""
    if isinstance(source, Examples):
        return (text for one in (*source.training, *source.held_out) for text in (one.prompt, one.response))
    return iter(source.held_out if isinstance(source, Stream) else [*source.training, *source.held_out])


def _responses(examples: list[Example], tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Responses:
    def count_tokens(texts: list[str]) -> list[int]:
        # All at once is much faster than one by one.
        return [len(ids) for ids in tokenizer(texts)["input_ids"]]

    examples = as_chats(examples, tokenizer)
    return Responses(response_pairs(examples, count_tokens, sizes.block_size), tokenizer, sizes.block_size)
