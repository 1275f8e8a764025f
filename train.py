"""Train a model with layer dropout and early-exit loss; see `self_speculation/commands/train.py`."""

from self_speculation.commands.ending import one_sentence_errors

# Packages take seconds to import, and Ctrl-C may come meanwhile.
with one_sentence_errors():
    from self_speculation.commands.train import main

if __name__ == "__main__":
    main()
