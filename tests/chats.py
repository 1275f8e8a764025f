"""A tiny tokenizer that chats."""

import copy

from transformers import PreTrainedTokenizerFast

# As many published templates: an end of turn that is not the end of text, and a beginning that tokenizing adds too.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n' + message.content | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def chatting(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy with a chat template, whose tokens fit a vocabulary of 300."""
    chats = copy.deepcopy(tokenizer)
    chats.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    chats.chat_template = TEMPLATE
    return chats
