"""Prompts and training texts: what `self_speculation.prompts` offers."""

from self_speculation.prompts.arguments import DatasetArguments, TextArguments
from self_speculation.prompts.example import Example
from self_speculation.prompts.sources import read_examples, read_source

__all__ = ["DatasetArguments", "Example", "TextArguments", "read_examples", "read_source"]
