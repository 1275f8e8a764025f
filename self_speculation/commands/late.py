"""What a program does is imported once its flags are read: --help and mistakes are answered without torch."""

from importlib import import_module
from types import ModuleType

from self_speculation.ending import importing


def late(name: str) -> ModuleType:
    """The module of this folder that does a program's work; a signal ends the program at once while it is imported."""
    with importing():
        return import_module(f"self_speculation.commands.{name}")
