"""Check that self-speculative output is the full model's; see `self_speculation/commands/correctness.py`."""

from self_speculation.commands.ending import one_sentence_errors

# Packages take seconds to import, and Ctrl-C may come meanwhile.
with one_sentence_errors():
    from self_speculation.commands.correctness import main

if __name__ == "__main__":
    main()
