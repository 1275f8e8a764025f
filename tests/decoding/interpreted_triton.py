"""The arithmetic of exact passes on CUDA, run by Triton's interpreter on tensors of the CPU.

Not collected by itself: `test_width_invariant_triton.py` runs it in a process of its own, for which TRITON_INTERPRET is
set. The interpreter multiplies tiles by NumPy, so what is held here is which numbers are added up in which order.

Shapes: M rows, D hidden size, O outputs, B batch, T positions, H heads, C capacity, K head dimension.
"""

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from perturbing import perturbed
from test_width_invariant import ODD, prompts_of, random_tokens, read
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from triton.runtime import interpreter

from self_speculation import stepwise_strategy
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding import width_invariant_triton as kernels
from self_speculation.decoding.early_exit import TorchKernels
from self_speculation.decoding.fused_layers import fuse
from self_speculation.decoding.width_invariant_cuda import TritonKernels
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

MakeModel = Callable[..., LlamaForCausalLM]
Answer = Callable[..., list[list[int]]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# One below and one above the rows of a tile among them.
WIDTHS = (*range(1, 10), 15, 17)
MOST = max(WIDTHS)
BLOCK = kernels.KEYS.value
# Two heads that share their keys.
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True, scope="session")
def patched_once() -> Iterator[None]:
    """The interpreter patches Triton's language at every call of a function, for half of its time; once will do."""
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable[..., object]) -> SimpleNamespace:
        module = function.__globals__.get("tl", tl.core)
        if module not in patched:
            patch(function)
        patched.add(module)
        return SimpleNamespace(restore=lambda: None)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse=True)
def true_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy has no bfloat16: the interpreter keeps its bits, cuts them off instead of rounding, and multiplies them."""
    cast, dot = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = torch.from_numpy(handle.data).view(torch.bfloat16).float()
        return interpreter.TensorHandle(wide.numpy(), tl.float32)

    def create_fp_to_fp(self: object, source: interpreter.TensorHandle, dtype: tl.dtype, _: object = None) -> object:
        if dtype.scalar != tl.bfloat16:
            return cast(self, widened(source), dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)

    def create_dot(self: object, a: interpreter.TensorHandle, b: interpreter.TensorHandle, *others: object) -> object:
        return dot(self, widened(a), widened(b), *others)

    for name, function in {
        "create_fp_to_fp": create_fp_to_fp,
        "create_fp_ext": create_fp_to_fp,
        "create_fp_trunc": create_fp_to_fp,
        "create_dot": create_dot,
    }.items():
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, function)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonKernels, "device_type", "cpu")
    monkeypatch.setattr(stepwise_strategy, "own_kernels", lambda model: TritonKernels)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def same_at_all_widths(function: Callable[[Tensor], Tensor], x_MD: Tensor) -> Tensor:
    """The rows' results at once, which are the same bits at every width, and wherever in a tile a row stands."""
    at_once = function(x_MD)
    for width in WIDTHS:
        assert torch.equal(function(x_MD[-width:]), at_once[-width:]), width
    shuffled = torch.randperm(len(x_MD), generator=torch.Generator().manual_seed(1))
    assert torch.equal(function(x_MD[shuffled]), at_once[shuffled])
    return at_once


def assert_is_close(found: Tensor, exact: Tensor) -> None:
    """To a few roundings of the type."""
    assert found.isfinite().all()
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error < 8 * torch.finfo(found.dtype).eps


@each_dtype
def test_a_product(dtype: torch.dtype) -> None:
    size, outputs = 150, 37
    x_MD, weight_OD = random(MOST, size, dtype=dtype), random(outputs, size, dtype=dtype)
    found = same_at_all_widths(lambda part: kernels._product(part, weight_OD, is_wide=True), x_MD)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    exact = x_MD.double() @ weight_OD.double().T
    assert_is_close(found, exact)
    added_MO = random(MOST, outputs, dtype=dtype)
    rounded = kernels._product(x_MD, weight_OD, added_MO)
    assert rounded.dtype == dtype
    assert_is_close(rounded, exact + added_MO.double())


@each_dtype
def test_gates(dtype: torch.dtype) -> None:
    x_MD, gate_up = random(MOST, 36, dtype=dtype), random(2 * 37, 36, dtype=dtype)
    found = same_at_all_widths(lambda part: kernels._gated(part, gate_up), x_MD)
    gate, up = (x_MD.double() @ gate_up.double().T).chunk(2, dim=-1)
    assert_is_close(found, F.silu(gate) * up)


@each_dtype
def test_a_norm(dtype: torch.dtype) -> None:
    x_MD, weight_D = random(MOST, 37, dtype=dtype), random(37, dtype=dtype)
    found = same_at_all_widths(lambda part: kernels._normed(part, weight_D, 1e-5), x_MD)
    assert_is_close(found, F.rms_norm(x_MD.double(), (37,), weight_D.double(), 1e-5))


@each_dtype
def test_attention_reads_its_own_prefix_alone(dtype: torch.dtype) -> None:
    """At the ends of blocks; beside what lies beyond, which may be anything; in every batch."""
    heads, key_heads, head_dim = 4, 2, 14
    positions_T = torch.tensor([0, 1, BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK])
    length, wide = len(positions_T), torch.promote_types(dtype, torch.float32)
    queries_BTHK = random(2, length, heads, head_dim, dtype=wide)
    cached = [random(2, key_heads, 3 * BLOCK, head_dim + more, dtype=dtype)[..., more:] for more in (0, 1)]
    cached = [buffer.contiguous() for buffer in cached]

    def attended(rows: slice, places: slice, buffers: list[Tensor]) -> Tensor:
        queries_BTHk = queries_BTHK[rows, places].contiguous()
        positions_BT = positions_T[places].expand(len(queries_BTHk), -1).contiguous()
        result = kernels._attended(queries_BTHk.flatten(2).flatten(0, 1), positions_BT, [b[rows] for b in buffers])
        return result.unflatten(0, positions_BT.shape).unflatten(-1, (heads, head_dim))

    everything = slice(None)
    at_once = attended(everything, everything, cached)
    for row, place in itertools.product(range(2), range(length)):
        beyond = [buffer.clone() for buffer in cached]
        for buffer in beyond:
            buffer[:, :, positions_T[place] + 1 :] = float("nan")
        alone = attended(slice(row, row + 1), slice(place, place + 1), beyond)
        assert torch.equal(alone[0, 0], at_once[row, place])
    mask_TC = torch.arange(3 * BLOCK) <= positions_T[:, None]
    query, keys, values = queries_BTHK.transpose(1, 2).double(), *(buffer.double() for buffer in cached)
    exact = F.scaled_dot_product_attention(query, keys, values, mask_TC, enable_gqa=True)
    assert_is_close(at_once, exact.transpose(1, 2))


def test_what_begins_anywhere_is_laid_out() -> None:
    """One binary serves all passes: where a tensor begins is compiled into it."""
    whole = torch.arange(40)
    for first in range(8):
        own = kernels._laid_out(whole[first::2])
        assert own.data_ptr() % kernels.ALIGNMENT == 0
        assert own.is_contiguous()
        assert torch.equal(own, whole[first::2])


# Models


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({}, torch.bfloat16),
        pytest.param({}, torch.float16, marks=pytest.mark.slow),
        pytest.param(ODD, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bits_depend_on_neither_width_nor_batch(
    shape: dict[str, int], dtype: torch.dtype, make_model: MakeModel
) -> None:
    model = perturbed(make_model(num_hidden_layers=1, **shape)).to(dtype)
    own, tokens_BT = TritonKernels(model), random_tokens(2, 9)
    at_once = read(own, tokens_BT, itertools.repeat(9))
    assert torch.equal(read(own, tokens_BT[:1], itertools.cycle([1, 4])), at_once[:1])
    wide = perturbed(make_model(num_hidden_layers=1, **shape)).to(dtype).double()
    fuse(wide)
    exact = read(TorchKernels(wide), tokens_BT, itertools.repeat(9))
    torchs = read(TorchKernels(model), tokens_BT, itertools.repeat(9))
    own_error, error = ((found - exact).abs().max().item() for found in (at_once, torchs))
    assert own_error <= 2 * error


@pytest.fixture
def answer(tokenizer: PreTrainedTokenizerBase) -> Answer:
    def answer(strategy: GenerationStrategy, prompts: list[list[int]], **fields: object) -> list[list[int]]:
        assert isinstance(strategy.kernels(GenerationConfig(exact=True)), TritonKernels)
        config = GenerationConfig(**{"max_new_tokens": 5, "sample": False, "exact": True} | fields)
        return [result.tokens for result in HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config)]

    return answer


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_exact_answers_are_autoregressive_decodings(dtype: torch.dtype, make_model: MakeModel, answer: Answer) -> None:
    """A ragged batch, a prompt in chunks, a trimmed head."""
    model, prompts = perturbed(make_model(num_hidden_layers=2, **SMALL)).to(dtype), prompts_of(2, 6)
    expected = [answer(AutoregressiveStrategy(model), [prompt])[0] for prompt in prompts]
    drafting = SelfSpeculativeStrategy(model)
    for num_speculations, fields in ((2, {"draft_vocab": 150}), (4, {"prefill_chunk": 3})):
        fields |= {"exit_layer": 1, "num_speculations": num_speculations}
        assert answer(drafting, prompts, **fields) == expected


@pytest.mark.slow
def test_answers_in_float64_are_torchs_and_an_adapter_changes_nothing(make_model: MakeModel, answer: Answer) -> None:
    model, prompts = make_model(num_hidden_layers=2, **SMALL), prompts_of(5, 2)
    expected = answer(AutoregressiveStrategy(model), prompts, exact=False)
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, 1).eval())
    assert answer(SelfSpeculativeStrategy(model), prompts, exit_layer=1, num_speculations=3) == expected


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_steps_are_one_graph(backend: str | None, make_model: MakeModel, answer: Answer) -> None:
    """As they are captured; and traced as far as torch's compiler needs it, which must know what is written where."""
    model, prompts = perturbed(make_model(num_hidden_layers=2, **SMALL)).bfloat16(), prompts_of(4, 2)
    expected = answer(AutoregressiveStrategy(model), prompts)
    strategy = SelfSpeculativeStrategy(model, backend)
    fields = {"exit_layer": 1, "num_speculations": 2, "compile": "default"}
    assert answer(strategy, prompts, **fields) == expected
    [step] = strategy.compiled_steps.steps.values()
    assert step.backend == (backend or "eager")
