"""Prompts: one table of datasets, how their rows are read, formatted and fitted to a context."""
