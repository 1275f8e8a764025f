"""Find the fastest exit layer and draft length; see `self_speculation/commands/sweep.py`."""

from self_speculation.commands.ending import one_sentence_errors

# Packages take seconds to import, and Ctrl-C may come meanwhile.
with one_sentence_errors():
    from self_speculation.commands.sweep import main

if __name__ == "__main__":
    main()
