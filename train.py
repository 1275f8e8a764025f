"""Train a model with layer dropout and early-exit loss; see `self_speculation/commands/train.py`."""

from self_speculation.ending import importing

with importing():
    from self_speculation.commands.train import main

if __name__ == "__main__":
    main()
