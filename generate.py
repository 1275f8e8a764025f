"""Generate text by any decoding strategy; see `self_speculation/commands/generate.py`."""

from self_speculation.ending import importing

with importing():
    from self_speculation.commands.generate import main

if __name__ == "__main__":
    main()
