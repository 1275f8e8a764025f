"""train.py itself: what it writes, from what it goes on, and what it evaluates."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_endings import Terminal
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from self_speculation.commands import train, training_run
from self_speculation.decoding.draft_head import COUNTS_FILE
from self_speculation.measuring.report_sources import read_sections
from self_speculation.training.checkpoints import INCOMPLETE_FOLDER
from self_speculation.training.run_record import RUN_FILE

Run = Callable[..., int]


@pytest.fixture
def run(run_script: Run, tmp_path: Path) -> Run:
    """A function that runs `train.main` on a few texts with a tiny model; returns its exit code."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 8)
    own = (
        f"--output_dir {tmp_path}/out --vocab_size 270 --block_size 16 --num_layers 2 --hidden_size 16 "
        "--intermediate_size 24 --num_heads 2 --num_kv_heads 1 --max_steps 3 --save_steps 2 --eval_blocks 4 "
        "--per_device_train_batch_size 2 --use_cpu True --report_to none --held_out 0.2 --rotation_interval 2 "
        f"--token_cache {tmp_path}/tokens --recommend_tokens 4 --recommend_samples 1"
    ).split()

    def main(*flags: str) -> int:
        has_texts = {"--data_path", "--hub_dataset", "--dataset"} & set(flags)
        return run_script(train.main, *own, *(() if has_texts else ("--data_path", folder)), *flags)

    return main


def checkpoints(output: Path) -> dict[str, int]:
    """When each checkpoint was written, in nanoseconds."""
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("checkpoint-*/trainer_state.json")}


def new_checkpoints(run: Run, output: Path, *flags: str) -> set[str]:
    """The checkpoints that a run writes, into a folder that may have some."""
    before = checkpoints(output)
    assert run(*flags) == 0
    return {name for name, written in checkpoints(output).items() if before.get(name) != written}


def test_what_a_checkpoint_takes_is_told(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Muon's and AdamW's states, too, which are one optimiser's."""
    assert run("--muon", "True", "--hidden_size", "128", "--intermediate_size", "512") == 0
    [weights, states] = re.findall(
        r"A checkpoint takes .* \(weights (.*) MB, optimiser (.*) MB\)", capsys.readouterr().out
    )[0]
    sizes = [(tmp_path / "out/checkpoint-2" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")]
    # The files hold names beside the numbers.
    assert float(weights) == pytest.approx(sizes[0] / 1e6, abs=0.1)
    assert float(states) == pytest.approx(sizes[1] / 1e6, abs=0.1)
    assert float(states) > 1


def test_main_trains_resumes_and_writes_what_transformers_loads(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    resume = "--resume_from_checkpoint"
    # There is no checkpoint yet.
    assert new_checkpoints(run, output, resume, "True") == {"checkpoint-2", "checkpoint-3"}
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (2, 270)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    ids_BT = tokenizer("def f1(x):", return_tensors="pt").input_ids
    assert model.generate(ids_BT, max_new_tokens=3, do_sample=False).shape[1] > ids_BT.shape[1]
    table = pd.read_csv(output / "exits.csv")
    assert table["exit_layer"].tolist() == [1, 2]
    assert table["agreement"].tolist()[1] == 1
    assert table["loss"].between(0, 10).all()
    assert (output / "exits.png").read_bytes().startswith(b"\x89PNG")
    [section] = read_sections(output, most_answers=1)
    assert section.settings["vocab_size"] == 270
    assert [shown.title for shown in section.tables] == ["Exit layers", "Recommended", "Log"]
    assert list(section.pictures) == ["Exit layers"]
    advice = json.loads((output / "layerskip.json").read_text())
    assert (output / COUNTS_FILE).is_file()
    said = capsys.readouterr().out
    assert "exit_layer" in said
    assert "A checkpoint takes " in said
    assert said.count("{'loss': ") == 3
    settings = json.loads((output / "train_settings.json").read_text())
    assert settings.items() >= {"max_steps": 3, "save_steps": 2, "num_layers": 2}.items()
    last_line, totals = said.splitlines()[-2:]
    found = json.loads(totals)
    assert [one["exit_layer"] for one in found["exits"]] == [1, 2]
    assert found["exits"][1]["loss"] == pytest.approx(table["loss"][1], rel=1e-5)
    assert found["recommended"].items() >= {name: advice[name] for name in ("exit_layer", "num_speculations")}.items()
    assert last_line.startswith(f"Loss {table['loss'][1]:.3f} (perplexity {table['perplexity'][1]:.2f}), agreement")
    assert f"exit layer 1 with {advice['num_speculations']} drafts recommended" in last_line
    assert last_line.endswith(f"; saved in {output}.")
    assert {folder.name for folder in output.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-3"}

    whole = (output / "model.safetensors").read_bytes()
    for value, written in (("True", set()), (str(output / "checkpoint-2"), {"checkpoint-3"})):
        assert new_checkpoints(run, output, resume, value) == written
        assert (output / "model.safetensors").read_bytes() == whole
    assert "Going on after step 2 of 3: the learning rate is " in capsys.readouterr().out
    shutil.rmtree(output / "checkpoint-3")
    (output / INCOMPLETE_FOLDER / "checkpoint-3").mkdir(parents=True)
    assert new_checkpoints(run, output, resume, "True") == {"checkpoint-3"}
    assert (output / "model.safetensors").read_bytes() == whole


def test_main_goes_on_from_a_model(run: Run, tmp_path: Path) -> None:
    assert run("--num_train_epochs", "1", "--max_steps", "-1", "--save_strategy", "no") == 0
    first = load_file(tmp_path / "out" / "model.safetensors")
    flags = ["--model", str(tmp_path / "out"), "--output_dir", str(tmp_path / "second"), "--learning_rate", "1e-30"]
    assert run(*flags, "--num_layers", "7", "--vocab_size", "999") == 0
    torch.testing.assert_close(load_file(tmp_path / "second" / "model.safetensors"), first, rtol=0, atol=0)


def test_main_evaluates_alone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--save_strategy", "no") == 0
    trained, said = pd.read_csv(tmp_path / "out" / "exits.csv"), capsys.readouterr().out
    flags = ["--model", str(tmp_path / "out"), "--output_dir", str(tmp_path / "scores"), "--do_eval", "True"]
    assert run(*flags) == 0
    scores = pd.read_csv(tmp_path / "scores" / "exits.csv")
    assert scores["exit_layer"].tolist() == [1, 2]
    # The saved model is rounded to bfloat16.
    assert scores["loss"].tolist() == pytest.approx(trained["loss"].tolist(), rel=1e-2)
    assert {file.name for file in (tmp_path / "scores").iterdir()} == {"exits.csv", "exits.png"}
    last_line, totals = capsys.readouterr().out.splitlines()[-2:]
    assert last_line.startswith("Loss ")
    assert said.count("recommended") == 2
    assert "recommended" not in last_line
    assert json.loads(totals).keys() == {"exits"}
    # While training goes on, and then trains.
    (tmp_path / "out" / "model.safetensors").unlink()
    assert run("--do_eval", "True", "--do_train", "True", "--save_strategy", "no") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_main_finetunes_on_responses(run: Run, tmp_path: Path) -> None:
    rows = [
        {"domain": "alarm", "utterance": f"wake me at {number}", "semantic_parse": f"[IN:WAKE {number} ]"}
        for number in range(8)
    ]
    for split in ("train", "eval"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--recipe", "finetune_topv2_1.5b", "--data_path", str(tmp_path), "--bf16", "False", "--max_steps", "2"]
    assert run(*flags, "--block_size", "128", "--e_scale", "0.5", "--save_strategy", "no") == 0
    assert len(pd.read_csv(tmp_path / "out" / "exits.csv")) == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 270


def test_main_trains_a_given_configuration_on_a_stream(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    assert run("--save_strategy", "no", "--max_steps", "1") == 0
    (tmp_path / "hub").mkdir()
    rows = [json.dumps({"text": f"def f{number}(x):\n    return x + {number}\n"}) for number in range(40)]
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(rows))
    flags = ["--hub_dataset", str(tmp_path / "hub"), "--streaming", "True", "--tokenizer", str(tmp_path / "out")]
    flags += ["--config", str(tmp_path / "out" / "config.json"), "--output_dir", str(tmp_path / "second")]
    small = ["--hidden_size", "48", "--num_layers", "5", "--stream_held_out", "5", "--save_strategy", "no"]
    assert run(*flags, *small) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "second").config
    assert (config.num_hidden_layers, config.hidden_size, config.tie_word_embeddings) == (2, 16, True)
    assert run(*flags, "--max_steps", "-1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --max_steps must be given with --streaming")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and of those in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a refused run ends with."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    return said.splitlines()[-1]


# What a finished run is given that must not harm it, and what is named.
REFUSED = {
    "": "give --resume_from_checkpoint True to go on with it, or another --output_dir.",
    "--resume_from_checkpoint nope": "--resume_from_checkpoint: nope",
    "--resume_from_checkpoint {other}/checkpoint-2": "--output_dir: {out} holds an earlier run",
    "--resume_from_checkpoint True --learning_rate nan": "--learning_rate must be a finite number",
    "--resume_from_checkpoint True --learning_rate -1": "--learning_rate must be at least 0",
    "--resume_from_checkpoint True --weight_decay inf": "--weight_decay must be a finite number",
    "--resume_from_checkpoint True --adam_beta2 1": "--adam_beta2 must be less than 1",
    "--resume_from_checkpoint True --per_device_train_batch_size 0": "--per_device_train_batch_size must be at least 1",
    '--resume_from_checkpoint True --lr_scheduler_kwargs {{"bad":1}}': "--lr_scheduler_type linear",
    "--resume_from_checkpoint True --optim adamw_bnb_8bit": "--optim",
    "--resume_from_checkpoint True --hidden_size 24": "",
}


def test_a_refused_command_leaves_a_finished_run_as_it_was(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, other = tmp_path / "out", tmp_path / "other"
    assert run() == 0
    shutil.copytree(output, other)
    before = contents(output)
    capsys.readouterr()
    for flags, named in REFUSED.items():
        assert run(*flags.format(other=other).split(), "--vocab_size", "280") == 2, flags
        assert named.format(out=output) in refusal(capsys)
        assert contents(output) == before, flags
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert run("--resume_from_checkpoint", "True") == 2
    assert refusal(capsys).endswith(
        f"{output} holds an earlier run (model.safetensors) without a checkpoint of its own to go on from; give "
        "another --output_dir."
    )


# What is changed before a run is gone on with, and what is named.
CHANGED = {
    "--learning_rate 0.002": "had --learning_rate 5e-05, not 0.002",
    "--max_steps 5": "had --max_steps 3, not 5",
    "--p_max 0.3": "had --p_max 0.1, not 0.3",
    "--seed 7": "had --seed 42, not 7",
    "--separate_texts False": "had --separate_texts True, not False",
    "--held_out 0.4": "had --held_out 0.2, not 0.4",
}


def test_only_the_run_that_a_checkpoint_is_of_is_gone_on_with(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, resume = tmp_path / "out", ("--resume_from_checkpoint", "True")
    assert run() == 0
    before = contents(output)
    for flags, named in CHANGED.items():
        assert run(*resume, *flags.split()) == 2, flags
        expected = f"error: {output}/checkpoint-3: its run {named}; --resume_changed True goes on from it all the same."
        assert refusal(capsys) == expected
    assert run(*resume, *flags.split(), "--resume_changed", "True") == 2
    assert refusal(capsys).startswith("error: --resume_changed True needs another --output_dir")
    (tmp_path / "texts" / "0.py").write_text("def g(x):\n    return x * 3\n" * 8)
    assert run(*resume) == 2
    assert "its run was not one with texts like these; --resume_changed True" in refusal(capsys)
    assert contents(output) == before


def test_a_changed_run_goes_on_from_its_own_checkpoints(run: Run, tmp_path: Path) -> None:
    output, resume = tmp_path / "out", ("--resume_from_checkpoint", "True")
    assert run() == 0
    (output / "model.safetensors").unlink()  # As if it had been killed.
    changed = ("--learning_rate", "0.002", "--max_steps", "5")
    assert run("--resume_from_checkpoint", str(output / "checkpoint-2"), *changed, "--resume_changed", "True") == 0
    record = json.loads((output / RUN_FILE).read_text())
    assert (record["goes_on_from"], record["arguments"]["learning_rate"]) == ("checkpoint-2", 0.002)
    assert record == json.loads((output / "checkpoint-5" / RUN_FILE).read_text())
    assert record != json.loads((output / "checkpoint-3" / RUN_FILE).read_text())
    before = contents(output)
    assert run(*resume, *changed) == 0
    # Which exit layer is the fastest was measured again.
    assert contents(output) | {"layerskip.json": b""} == before | {"layerskip.json": b""}


def test_a_run_goes_on_in_another_folder(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "out", tmp_path / "second"
    assert run() == 0
    flags = ["--resume_from_checkpoint", str(first / "checkpoint-2"), "--output_dir", str(second)]
    assert run(*flags, "--data_path", str(shutil.copytree(tmp_path / "texts", tmp_path / "moved"))) == 0
    for name in ("model.safetensors", "checkpoint-3/optimizer.pt", "tokenizer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    record = json.loads((second / RUN_FILE).read_text())
    assert record["goes_on_from"] == str(first / "checkpoint-2")


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "half"])
def test_a_damaged_file_of_a_checkpoint_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes | None
) -> None:
    assert run() == 0
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"):
        path = tmp_path / "out" / "checkpoint-3" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        before = contents(tmp_path / "out")
        assert run("--resume_from_checkpoint", "True") == 2
        assert refusal(capsys).startswith(f"error: {path} is missing or damaged; move the folder {path.parent} away")
        assert contents(tmp_path / "out") == before
        path.write_bytes(whole)


def test_a_damaged_cache_of_tokens_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--do_eval", "True") == 0
    for path in (tmp_path / "tokens").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert run("--do_eval", "True") == 2
    sentence = refusal(capsys)
    assert sentence.startswith(f"error: {tmp_path / 'tokens'}/")
    assert sentence.endswith(".pt, of --token_cache, is damaged; delete it, and it is made anew.")


def test_evaluation_sets_earlier_figures_aside(run: Run, tmp_path: Path) -> None:
    assert run("--save_strategy", "no") == 0
    before = contents(tmp_path / "out")
    assert run("--do_eval", "True", "--eval_blocks", "1", "--model", str(tmp_path / "out")) == 0
    after = contents(tmp_path / "out")
    assert after["exits.csv"] != before["exits.csv"]
    assert after | {name: before[name] for name in ("exits.csv", "exits.png")} == before | {
        "exits.1.csv": before["exits.csv"],
        "exits.1.png": before["exits.png"],
    }


@pytest.mark.parametrize("flags", [[], ["--disable_tqdm", "True"]], ids=["bars", "no bars"])
def test_nothing_is_written_and_nothing_said_beside_the_figures(
    flags: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {*contents(tmp_path)}
    assert run("--no_log", "--quiet", *flags) == 0
    said = capfd.readouterr()
    assert said.err == ""
    head, *rows, last_line, totals = said.out.splitlines()
    assert head.split()[0] == "exit_layer"
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert last_line.startswith("Loss ")
    assert "saved" not in last_line
    assert json.loads(totals).keys() == {"exits", "recommended"}
    written = {*contents(tmp_path)} - before
    assert {Path(name).parts[0] for name in written} == {"tokens"}


def test_a_terminal_gets_the_figures_as_json_when_they_are_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, flags in enumerate(([], ["--json"])):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run("--no_log", "--recommend_samples", "0", *flags) == 0
        assert terminal.getvalue().splitlines()[-1].startswith('{"exits":') == bool(number)


@pytest.mark.parametrize(
    "flags", ["--resume_from_checkpoint True", "--load_best_model_at_end True --eval_strategy steps --eval_steps 2"]
)
def test_what_needs_checkpoints_is_refused_without_them(
    flags: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--no_log", *flags.split()) == 2
    said = f"error: --no_log keeps no checkpoints, and does not go with {flags.split()[0]}."
    assert refusal(capsys) == said


def test_several_processes_need_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"^--no_log takes one process"):
        training_run.keep_nothing(TrainingArguments(str(tmp_path), use_cpu=True), tmp_path)


def test_missing_data_path_is_named(run_script: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(train.main) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--data_path" in line


def signalling(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int, times: int = 1) -> None:
    """In the middle of a step the process gets a signal, once or more often."""
    run_step = Trainer.training_step

    def training_step(self: Trainer, *args: object, **kwargs: object) -> Tensor:
        if self.state.global_step == step - 1:
            for _ in range(times):
                signal.raise_signal(number)
        return run_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("number", "code", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_is_followed_by_a_checkpoint_of_the_running_step(
    number: signal.Signals, code: int, how: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run that goes on from it ends like one that was not interrupted."""
    flags = ("--max_steps", "5", "--save_steps", "100", "--p_max", "0.5", "--resume_from_checkpoint", "True")
    assert run(*flags, "--output_dir", f"{tmp_path}/whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        signalling(patch, number, step=2)
        assert run(*flags) == code
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"{how}. ")
    assert "--resume_from_checkpoint True" in sentence
    assert checkpoints(tmp_path / "out").keys() == {"checkpoint-2"}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(*flags) == 0
    for name in ("model.safetensors", "checkpoint-5/model.safetensors", "checkpoint-5/optimizer.pt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_an_interrupted_run_that_is_not_kept_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signalling(monkeypatch, signal.SIGINT, step=2)
    assert run("--no_log") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted. With --no_log nothing is kept."
    assert not (tmp_path / "out").exists()


def test_a_second_signal_counts_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalling(monkeypatch, signal.SIGINT, step=2, times=2)
    assert run("--save_steps", "100") == 130
    assert not checkpoints(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # NaN in the loss of the second step, and in the weights that the last step leaves.
        ("--learning_rate 1e39", "the loss of step 2 is "),
        ("--learning_rate 1e39 --max_steps 1", "is NaN or infinite"),
    ],
)
def test_training_that_diverges_ends_with_a_sentence(
    flags: str, said: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags.split(), "--save_steps", "100") == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: --learning_rate 1e+39: ")
    assert said in sentence
    assert not list((tmp_path / "out").rglob("*.safetensors"))
