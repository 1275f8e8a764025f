"""Exact passes on CUDA: in Triton's interpreter, as code for GPUs that need not be there, and on one that is."""

import itertools
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from perturbing import perturbed
from test_width_invariant import WIDTHS, prompts_of, random_tokens, read
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation import stepwise_strategy
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding import width_invariant_cuda
from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.early_exit import TorchKernels
from self_speculation.decoding.fused_layers import fuse
from self_speculation.decoding.width_invariant_cuda import TritonKernels
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

MakeModel = Callable[..., LlamaForCausalLM]
INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
LARGER = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2}
# What a program may have of a GPU's fastest memory without asking.
SHARED_MEMORY = 48 * 1024

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def interpret(markers: str) -> None:
    """In a process of its own: Triton asks once, when it is imported."""
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("Triton's interpreter does not know this NumPy yet")
    command = [sys.executable, "-m", "pytest", "-m", markers, "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=INTERPRETED.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_in_the_interpreter() -> None:
    interpret("not slow")


@needs_triton
@pytest.mark.slow
def test_more_in_the_interpreter() -> None:
    interpret("slow")


# As code for GPUs


@pytest.fixture
def binaries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int) -> dict[str, dict[str, Any]]:
    """What is compiled for a GPU of a capability, by the kernel's name and a hash; nothing is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit

    known: dict[str, dict[str, Any]] = defaultdict(dict)

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object) -> None:
            binary = kernel.run(*arguments, grid=grid, warmup=True)
            known[kernel.fn.__name__][binary.hash] = binary

        return launch

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(jit.KernelInterface, "__getitem__", launcher)
    monkeypatch.setattr(TritonKernels, "device_type", "cpu")
    return known


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16), (90, torch.float32), (90, torch.float64)],
    ids=str,
)
def test_one_binary_of_each_kernel_serves_every_width(
    dtype: torch.dtype, capability: int, binaries: dict[str, dict[str, Any]], make_model: MakeModel
) -> None:
    """Wherever a pass begins: another binary might take its sums in another order."""
    kernels = TritonKernels(make_model(num_hidden_layers=1).to(dtype))
    read(kernels, random_tokens(3, 17), itertools.repeat(17))
    first = {name: set(compiled) for name, compiled in binaries.items()}
    assert first.keys() == {"_normalize", "_multiply", "_gate", "_rotate", "_attend"}
    read(kernels, random_tokens(2, 45), itertools.cycle(WIDTHS))
    whole_BTD, positions_BT = torch.zeros(1, 17, 32, dtype=dtype), torch.arange(17)[None]
    for start in range(17):
        part = slice(start, None)
        cache = PositionAddressedCache(1, 64)
        kernels.run_layers(whole_BTD[:, part], range(1), positions_BT[:, part], cache)
        kernels.logits(whole_BTD[:, part], kernels.model.model.norm)
    assert {name: set(compiled) for name, compiled in binaries.items()} == first
    for binary in itertools.chain.from_iterable(compiled.values() for compiled in binaries.values()):
        assert binary.asm["cubin"]
        assert binary.metadata.shared <= SHARED_MEMORY


# Which kernels are taken


def test_only_exactness_takes_them(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA; a model that is not there as a whole is refused."""
    monkeypatch.setattr(stepwise_strategy, "token_device", lambda model: torch.device("cuda"))
    strategy = AutoregressiveStrategy(make_model())
    for compile_mode in ("none", "default"):
        assert isinstance(strategy.kernels(GenerationConfig(compile=compile_mode)), TorchKernels)
    with pytest.raises(ValueError, match=r"^--exact True: only a model that is .* on one CUDA device, has passes"):
        strategy.kernels(GenerationConfig(exact=True))


def test_without_triton_there_is_a_sentence(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonKernels, "device_type", "cpu")
    monkeypatch.setattr(width_invariant_cuda, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--exact True: the passes on a CUDA device need Triton.*not installed\.$"):
        TritonKernels(make_model())


@needs_triton
def test_where_triton_fails_there_is_a_sentence(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it finds no device."""
    monkeypatch.setattr(TritonKernels, "device_type", "cpu")
    with pytest.raises(ValueError, match=r"^--exact True: the passes could not be built by Triton \([^\n]+\)\.$"):
        TritonKernels(make_model())


# On a GPU


@pytest.fixture
def answer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[int]]]:
    def answer(strategy: GenerationStrategy, prompts: list[list[int]], **fields: object) -> list[list[int]]:
        config = GenerationConfig(**{"max_new_tokens": 48, "sample": False, "exact": True} | fields)
        assert isinstance(strategy.kernels(config), TritonKernels)
        return [result.tokens for result in HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config)]

    return answer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [{}, LARGER], ids=["small", "larger"])
def test_bits_on_a_gpu(shape: dict[str, int], dtype: torch.dtype, make_model: MakeModel) -> None:
    model = perturbed(make_model(num_hidden_layers=2, **shape)).to("cuda", dtype)
    kernels, tokens_BT = TritonKernels(model), random_tokens(3, 150).cuda()
    at_once = read(kernels, tokens_BT, itertools.repeat(150))
    for width in (*WIDTHS, 17, 64):
        assert torch.equal(read(kernels, tokens_BT, itertools.repeat(width)), at_once)
    assert torch.equal(read(kernels, tokens_BT[1:2], itertools.cycle(WIDTHS)), at_once[1:2])
    wide = perturbed(make_model(num_hidden_layers=2, **shape)).to("cuda", dtype).double()
    fuse(wide)
    exact, torchs = (read(TorchKernels(one), tokens_BT, itertools.repeat(150)) for one in (wide, model))
    own_error, error = ((found.double() - exact).abs().max().item() for found in (at_once, torchs))
    assert own_error <= max(2 * error, 1e-5 * exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("compile_mode", ["none", "default"])
@pytest.mark.parametrize("sampling", [{}, {"sample": True, "sampling": "coupled", "top_p": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_answers_on_a_gpu(
    dtype: torch.dtype,
    sampling: dict[str, object],
    compile_mode: str,
    make_model: MakeModel,
    answer: Callable[..., list[list[int]]],
) -> None:
    """As they are written, and captured: token for token what each prompt gets alone, step by step."""
    model, prompts = perturbed(make_model(**LARGER)).to("cuda", dtype), prompts_of(1, 30, 7, 65)
    alone = AutoregressiveStrategy(model)
    expected = [answer(alone, [prompt], **sampling)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    fields = sampling | {"compile": compile_mode}
    assert answer(alone, prompts, **fields) == expected
    drafting = SelfSpeculativeStrategy(model)
    for exit_layer, num_speculations in itertools.product((1, 3), (1, 4, 8)):
        fields |= {"exit_layer": exit_layer, "num_speculations": num_speculations}
        assert answer(drafting, prompts, **fields) == expected
        assert answer(drafting, prompts[1:2], **fields, prefill_chunk=9, draft_vocab=150) == expected[1:2]
