"""Check that self-speculative output is the full model's; see `self_speculation/commands/correctness.py`."""

from self_speculation.ending import importing

with importing():
    from self_speculation.commands.correctness import main

if __name__ == "__main__":
    main()
