"""Measure strategies on the same prompts; see `self_speculation/commands/benchmark.py`."""

from self_speculation.commands.ending import one_sentence_errors

# Packages take seconds to import, and Ctrl-C may come meanwhile.
with one_sentence_errors():
    from self_speculation.commands.benchmark import main

if __name__ == "__main__":
    main()
