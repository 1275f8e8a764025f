"""Measure strategies on the same prompts; see `self_speculation/commands/benchmark.py`."""

from self_speculation.ending import importing

with importing():
    from self_speculation.commands.benchmark import main

if __name__ == "__main__":
    main()
