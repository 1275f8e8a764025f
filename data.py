"""Prompts and training texts: what `self_speculation.prompts` offers."""

from self_speculation.prompts.sources import DatasetArguments, Example, TextArguments, read_examples, read_source

__all__ = ["DatasetArguments", "Example", "TextArguments", "read_examples", "read_source"]
