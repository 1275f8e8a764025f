"""Score a model with lm-evaluation-harness; see `self_speculation/commands/eval.py`."""

from self_speculation.ending import importing

with importing():
    from self_speculation.commands.eval import main

if __name__ == "__main__":
    main()
