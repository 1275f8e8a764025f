"""The flags of all programs: what --help shows, what is accepted without being shown, and the command `layerskip`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest

from self_speculation import __main__, __version__
from self_speculation.commands.flags import parse
from self_speculation.settings import Settings, setting

TWO_SCREENS = 100


@dataclass
class Common(Settings):
    """What many need."""

    max_new_tokens: int = setting(5, help="Most new tokens.", at_least=0, flag="max_steps")
    sample: bool = setting(True, help="Sample.")
    stop_words: list[str] | None = setting(None, help="Ends.")
    batch_sizes: list[int] = setting(default_factory=lambda: [1, 8], help="Sizes.")


@dataclass
class Rare(Settings):
    """What few need."""

    nice_value: int = setting(7, help="Priority.")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (5, True, None, 7)),
        ("--max_steps 3 --sample False --stop_words a b --nice_value 1", (3, False, ["a", "b"], 1)),
        ("--max-steps 3 --no_sample --stop-words a --nice-value 1", (3, False, ["a"], 1)),
        ("--max_new_tokens 3 --no-sample", (3, False, None, 7)),
    ],
)
def test_flags_have_several_spellings(flags: str, expected: tuple[object, ...]) -> None:
    common, rare = parse(Common, rare=(Rare,), args=flags.split())
    assert (common.max_new_tokens, common.sample, common.stop_words, rare.nice_value) == expected


@pytest.mark.parametrize("flags", ["--max_steps -1", "--max_steps x", "--max_s 3", "--nice_value x"])
def test_a_mistake_is_one_sentence(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Common, rare=(Rare,), args=flags.split())
    assert stop.value.code == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: ")
    assert flags.split()[0] in sentence


def shown(flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(Common, rare=(Rare,), description="Does it.", args=[flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_each_flag_once_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("--help", capsys).splitlines()
    assert "Does it." in lines
    start = lines.index("What many need:")
    assert [" ".join(line.split()) for line in lines[start + 1 : start + 5]] == [
        "--max_steps INT Most new tokens. (default: 5)",
        "--sample [BOOL] Sample. (default: True)",
        "--stop_words TEXT [TEXT ...] Ends.",
        "--batch_sizes INT [INT ...] Sizes. (default: 1 8)",
    ]


def test_rare_flags_are_shown_when_all_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nice" not in shown("--help", capsys)
    assert "What few need:" in (text := shown("--help_all", capsys))
    assert "--nice_value INT" in text


def test_a_rare_setting_is_shown_when_all_are_asked_for(
    run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module("self_speculation.commands.benchmark").main
    assert run_script(main, "--help") == 0
    assert "--prefill_chunk" not in capsys.readouterr().out
    assert run_script(main, "--help_all") == 0
    assert "--prefill_chunk INT" in capsys.readouterr().out


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_help_is_two_screens(
    verb: str, run_script: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    command = import_module(f"self_speculation.commands.{verb}")
    assert run_script(command.main, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= TWO_SCREENS
    assert command.__doc__.splitlines()[0] in lines
    assert run_script(command.main, "--version") == 0
    assert capsys.readouterr().out == f"layerskip {__version__}\n"


def test_the_rest_of_training_s_flags_are_under_help_all(
    run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    train = import_module("self_speculation.commands.train").main
    assert run_script(train, "--help") == 0
    assert "--learning_rate FLOAT" not in capsys.readouterr().out
    assert run_script(train, "--help_all") == 0
    assert "--learning_rate FLOAT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 0, "usage: layerskip VERB"),
        (["--help"], 0, "usage: layerskip VERB"),
        (["--version"], 0, f"layerskip {__version__}\n"),
        (["generate", "--version"], 0, f"layerskip {__version__}\n"),
        (["gernerate"], 2, "error: layerskip has no verb 'gernerate'; it has generate, "),
        (["generate", "--nonsense"], 2, "error: "),
    ],
)
def test_layerskip_runs_its_verbs(
    arguments: list[str], code: int, said: str, run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(__main__.main, *arguments) == code
    output = capsys.readouterr()
    assert (output.err if code else output.out).startswith(said)


def test_a_verb_says_which_packages_it_needs(
    run_script: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name == "self_speculation.commands.evaluating"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_script(__main__.main, "eval", "--tasks", "any") == 2
    assert "layerskip[eval]" in capsys.readouterr().err
