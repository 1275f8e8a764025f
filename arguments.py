"""The flags of the programs: what `self_speculation.commands.flags` offers."""

from self_speculation.commands.flags import OutputArguments, parse

__all__ = ["OutputArguments", "parse"]
