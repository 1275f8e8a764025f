"""Training on two processes equals training on one, under DDP and FSDP; and what a kill leaves behind.

All start processes, each of which has a time limit and is ended with the test.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from self_speculation.training.early_exit_loss import EarlyExitLoss, ExitSchedule
from self_speculation.training.exit_measures import scoring
from self_speculation.training.layer_dropout import DropoutRates, LayerDropout

LIMIT_SECONDS = 240
# Of two layers, the first is never dropped.
NUM_LAYERS, NUM_STEPS = 2, 4
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
TEXTS = [f"def f{number}(x):\n    return x + {number}\n" * 8 for number in range(6)]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).double()


def make_batch() -> Tensor:
    """Two sequences: one for each process."""
    return torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(1))


def train_steps(model: LlamaForCausalLM, ids_BT: Tensor, p_max: float) -> list[float]:
    """Steps of plain gradient descent with layer dropout and early-exit loss; the losses before each."""
    every = tuple(range(1, NUM_LAYERS + 1))
    schedule = ExitSchedule(NUM_LAYERS, NUM_STEPS, every, rotation_interval=2)
    loss = EarlyExitLoss(model, schedule, "labels", chunk_tokens=5)
    dropout = LayerDropout(model.model.layers, DropoutRates(p_max, NUM_LAYERS, NUM_STEPS, "constant"), seed=0)
    dropout.attach()
    loss.attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for dropout.step in range(NUM_STEPS):
        loss.step = dropout.step
        value = model.train()(input_ids=ids_BT, labels=ids_BT).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def fsdp_worker(rank: int, folder: str, p_max: float) -> None:
    """One of two processes: its sequence through layers and loss that both hold a half of."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, ids_1T = make_model(), make_batch()[rank : rank + 1]
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    losses = train_steps(model, ids_1T, p_max)
    with scoring(model.eval(), chunk=5), torch.no_grad():
        sums_1EM = model(input_ids=ids_1T, labels=ids_1T).logits
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    torch.save({"losses": losses, "sums": sums_1EM, "state_dict": state_dict}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run_two(worker: Callable[..., None], *args: object) -> None:
    """Run a worker in two processes; whatever happens, they end with this."""
    context = mp.start_processes(worker, args, nprocs=2, join=False, start_method="spawn")
    end = time.monotonic() + LIMIT_SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


@pytest.mark.slow
@pytest.mark.parametrize("p_max", [0.0, 0.5, 1.0])
def test_fsdp_trains_and_scores_like_one_process(tmp_path: Path, p_max: float) -> None:
    """One sample a process: at p_max = 1 both drop their only one in the last layer, at every step."""
    run_two(fsdp_worker, str(tmp_path), p_max)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = make_model()
    if p_max == 0.5:  # Alone, two samples would be drawn for, not one and the same for each process.
        assert first["losses"] != second["losses"]
        assert all(torch.isfinite(tensor).all() for tensor in first["state_dict"].values())
        return
    losses = train_steps(model, make_batch(), p_max)
    both = [sum(pair) / 2 for pair in zip(first["losses"], second["losses"], strict=True)]
    assert both == pytest.approx(losses, rel=1e-6)
    assert losses[-1] < losses[0]
    assert first["state_dict"].keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(first["state_dict"][name], expected, rtol=0, atol=1e-6)
    with scoring(model.eval(), chunk=5), torch.no_grad():
        sums_BEM = model(input_ids=make_batch(), labels=make_batch()).logits
    torch.testing.assert_close(torch.cat([first["sums"], second["sums"]]), sums_BEM, rtol=1e-5, atol=1e-5)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """What train.py needs for a few steps of a tiny model."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.py").write_text(text)
    return (
        f"--data_path {tmp_path}/texts --output_dir {tmp_path}/out --token_cache {tmp_path}/tokens --vocab_size 270 "
        "--block_size 16 --num_layers 2 --hidden_size 16 --intermediate_size 24 --num_heads 2 --num_kv_heads 1 "
        "--max_steps 3 --save_steps 2 --logging_steps 1 --eval_blocks 5 --per_device_train_batch_size 4 --use_cpu True "
        "--report_to none --held_out 0.2 --rotation_interval 2 --layer_dropout_schedule constant --optim sgd "
        "--learning_rate 0.3 --recommend_samples 0"
    ).split()


def run_script(flags: list[str], num_processes: int = 1) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [
        sys.executable,
        *(launch if num_processes > 1 else []),
        str(Path(__file__).parents[2] / "train.py"),
        *flags,
    ]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            _, said = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.terminate()  # Not killed: torchrun ends its own processes when it is asked to end.
    assert process.returncode == 0, said.decode()[-2000:]


def logged(output: Path, name: str) -> list[float]:
    """What the Trainer logged under a name, up to the last checkpoint."""
    state = json.loads((Path(get_last_checkpoint(str(output))) / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p_max", "accumulation", "find_unused"), [("0.0", 1, "True"), ("0.0", 2, "True"), ("1.0", 1, "False")]
)
def test_two_processes_train_like_one(
    flags: list[str], tmp_path: Path, p_max: str, accumulation: int, find_unused: str
) -> None:
    # Full dropout of the last layer at every step: each process must still find a gradient for all parameters.
    flags = [*flags, "--p_max", p_max, "--eval_strategy", "steps", "--eval_steps", "1"]
    run_script(flags)
    own = ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", str(2 // accumulation)]
    own += ["--gradient_accumulation_steps", str(accumulation), "--ddp_backend", "gloo"]
    run_script([*flags, *own, "--ddp_find_unused_parameters", find_unused], num_processes=2)
    assert {folder.name for folder in (tmp_path / "two").glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-3"}
    one, two = (load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("out", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-5)
    for name in ("loss", "eval_loss", "eval_exit_1_loss", "eval_exit_1_agreement"):
        curve = logged(tmp_path / "two", name)
        assert len(curve) == 3
        assert curve == pytest.approx(logged(tmp_path / "out", name), abs=2e-3 if name == "loss" else 1e-5)


@pytest.mark.slow
def test_adapters_train_in_two_processes_like_in_one(flags: list[str], tmp_path: Path) -> None:
    run_script([*flags, "--max_steps", "1"])
    # The last layer is dropped at every step: its adapters have no gradients but those that dropout gives them.
    own = ["--model", str(tmp_path / "out"), "--lora_rank", "2", "--p_max", "1.0"]
    own += ["--exit_target", "acceptance", "--acceptance_after", "0.5", "--anchor_weight", "0.5"]
    run_script([*flags, *own, "--output_dir", str(tmp_path / "one")])
    own += ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2", "--ddp_backend", "gloo"]
    run_script([*flags, *own, "--ddp_find_unused_parameters", "False"], num_processes=2)
    for file in ("adapter/adapter_model.safetensors", "model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-5)
    before = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(one["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(one["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.slow
def test_killed_runs_end_like_the_uninterrupted_one(flags: list[str], tmp_path: Path) -> None:
    steps = ["--p_max", "0.5", "--max_steps", "60", "--save_steps", "5", "--resume_from_checkpoint", "True"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_script([*flags, *steps, "--output_dir", str(whole)])
    command = [sys.executable, str(Path(__file__).parents[2] / "train.py"), *flags, *steps, "--output_dir", str(killed)]
    draws = random.Random(time.time_ns())
    for first in (1, 2):  # Once in the first run, once in the one that goes on from it.
        with (
            subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
            ended(process),
        ):
            end = time.monotonic() + LIMIT_SECONDS
            while len(list(killed.glob("checkpoint-*"))) < 2 * first and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(draws.random() * 0.1)
    assert not (killed / "model.safetensors").exists()
    for checkpoint in killed.glob("checkpoint-*"):
        assert {file.name for file in checkpoint.iterdir()} >= {"model.safetensors", "optimizer.pt"}, checkpoint
    run_script([*flags, *steps, "--output_dir", str(killed)])
    for name in ("checkpoint-60/model.safetensors", "checkpoint-60/optimizer.pt", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_like_the_uninterrupted_one(flags: list[str], tmp_path: Path) -> None:
    steps = ["--p_max", "0.5", "--max_steps", "300", "--save_steps", "1000", "--resume_from_checkpoint", "True"]
    steps += ["--dataloader_num_workers", "2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_script([*flags, *steps, "--output_dir", str(whole)])
    own = [*flags, *steps, "--output_dir", str(stopped)]
    command = [sys.executable, str(Path(__file__).parents[2] / "train.py"), *own]
    with (
        subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as process,
        ended(process),
    ):
        end = time.monotonic() + LIMIT_SECONDS
        # Written when the first step is to begin.
        while not (stopped / "layerskip_run.json").exists() and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)  # As a terminal and many a scheduler do it.
        said = process.communicate(timeout=LIMIT_SECONDS)[1].decode()
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert "--resume_from_checkpoint True" in said.splitlines()[-1]
    [checkpoint] = stopped.glob("checkpoint-*")
    assert 0 < int(checkpoint.name.rpartition("-")[2]) < 300
    run_script(own)
    for name in ("checkpoint-300/model.safetensors", "checkpoint-300/optimizer.pt", "model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Kill the process at the end as `kill -9` does."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
