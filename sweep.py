"""Find the fastest exit layer and draft length; see `self_speculation/commands/sweep.py`."""

from self_speculation.ending import importing

with importing():
    from self_speculation.commands.sweep import main

if __name__ == "__main__":
    main()
