"""Llama's layers and LM head on CUDA, in Triton: passes in which no row depends on how many stand beside it.

Every sum is taken in one fixed order, in float32 (float64 for float64 models):

- A product x Wᵀ goes in tiles of 16 rows, over D in blocks of a fixed size. A longer pass is more such tiles, and rows
  that a tile lacks are zeros. No sum over D is split.
- A norm, and the rotary embedding, has one program for each row.
- Attention has one program for each row and query head. It goes over the row's own prefix in blocks of a fixed size,
  in the order of the positions; what lies beyond is never read.

One binary of each kernel serves every width: the number of rows is not compiled into it, and what differs from pass to
pass begins where vectors may begin. A grid depends on shapes alone, and nothing asks the host, so that a pass can be
captured.

Shapes: B batch, T positions, M = B·T rows, D hidden size (of a product: what is summed over), O rows of a matrix, I
width inside the MLP, H query heads, G query heads for each key head, N heads of all kinds, K head dimension, C
capacity; in a tile R rows, S outputs, J keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a tile, the fewest that processors multiply at once; and keys that are read at once.
ROWS = tl.constexpr(16)
KEYS = tl.constexpr(64)
# Where vectors begin, in bytes.
ALIGNMENT = 16


@torch.library.custom_op("layerskip::run_layer", mutates_args={"cached"})
def run_layer(
    hidden_BTD: Tensor, positions_BT: Tensor, cached: list[Tensor], weights: list[Tensor], epsilon: float
) -> Tensor:
    """What leaves a layer (B, T, D).

    `cached` are its keys and values (B, H/G, C, K), written at the positions; `weights` the two norms and four
    matrices in their order, then the rotary embedding's cosines and sines (C, K).
    """
    # Kernels are launched on the current device, which may be another than the model's.
    with torch.cuda.device_of(hidden_BTD):
        return _layer(_laid_out(hidden_BTD), _laid_out(positions_BT), cached, weights, epsilon)


@run_layer.register_fake
def _(hidden_BTD: Tensor, positions_BT: Tensor, cached: list[Tensor], weights: list[Tensor], epsilon: float) -> Tensor:
    return hidden_BTD.new_empty(hidden_BTD.shape)


def _layer(
    hidden_BTD: Tensor, positions_BT: Tensor, cached: list[Tensor], weights: list[Tensor], epsilon: float
) -> Tensor:
    attention_norm, heads_OD, attention_out, mlp_norm, gate_up, mlp_out, *rotary_CK = weights
    projected_MO = _product(_normed(hidden_BTD, attention_norm, epsilon), heads_OD, is_wide=True)
    queries_MO = _cache(projected_MO, positions_BT, cached, rotary_CK)
    attended_MO = _attended(queries_MO, positions_BT, cached)
    # Within a layer the state is wide; between two it is in the model's own type, wherever the model is cut.
    states_MD = _product(attended_MO, attention_out, hidden_BTD, is_wide=True)
    inner_MI = _gated(_normed(states_MD, mlp_norm, epsilon), gate_up)
    return _product(inner_MI, mlp_out, states_MD).view_as(hidden_BTD)


@torch.library.custom_op("layerskip::read_head", mutates_args=())
def read_head(hidden_BTD: Tensor, norm_D: Tensor, head_VD: Tensor, epsilon: float) -> Tensor:
    """Logits (B, T, V) of hidden states: a norm, then the rows of an LM head."""
    with torch.cuda.device_of(hidden_BTD):
        logits_MV = _product(_normed(_laid_out(hidden_BTD), norm_D, epsilon), head_VD)
    return logits_MV.view(*hidden_BTD.shape[:2], -1)


@read_head.register_fake
def _(hidden_BTD: Tensor, norm_D: Tensor, head_VD: Tensor, epsilon: float) -> Tensor:
    return hidden_BTD.new_empty(*hidden_BTD.shape[:2], len(head_VD))


def _laid_out(tensor: Tensor) -> Tensor:
    """The tensor in one piece, beginning where vectors may begin: where it begins is compiled into kernels."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _wide(tensor: Tensor) -> torch.dtype:
    """The type in which sums over such numbers are taken."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _normed(hidden_BTD: Tensor, norm_D: Tensor, epsilon: float) -> Tensor:
    """Hidden states (…, D) behind a norm, as rows (M, D) in the type of its weights."""
    size = len(norm_D)
    normed_MD = norm_D.new_empty(hidden_BTD.numel() // size, size)
    _normalize[(len(normed_MD),)]((hidden_BTD, norm_D, normed_MD), size, epsilon, triton.next_power_of_2(size))
    return normed_MD


def _product(x_MD: Tensor, weight_OD: Tensor, added_MO: Tensor | None = None, is_wide: bool = False) -> Tensor:
    """x Wᵀ + what is added (M, O), rounded once, to the type of the sums or to the model's."""
    dtype = _wide(x_MD) if is_wide else x_MD.dtype
    result_MO = x_MD.new_empty(len(x_MD), len(weight_OD), dtype=dtype)
    tensors, (outputs, block) = (x_MD, weight_OD, added_MO, result_MO), _tile(x_MD.dtype)
    grid = triton.cdiv(len(x_MD), ROWS.value), triton.cdiv(len(weight_OD), outputs)
    _multiply[grid](tensors, len(x_MD), (len(weight_OD), x_MD.shape[1]), outputs, block)
    return result_MO


def _gated(x_MD: Tensor, gate_up: Tensor) -> Tensor:
    """silu(gate)·up, (M, I); the matrices of both stand one below the other."""
    inner_MI = x_MD.new_empty(len(x_MD), len(gate_up) // 2)
    size, (outputs, block) = inner_MI.shape[1], _tile(x_MD.dtype)
    grid = triton.cdiv(len(x_MD), ROWS.value), triton.cdiv(size, outputs)
    _gate[grid]((x_MD, gate_up, inner_MI), len(x_MD), (size, x_MD.shape[1]), outputs, block)
    return inner_MI


def _cache(projected_MO: Tensor, positions_BT: Tensor, cached: list[Tensor], rotary_CK: list[Tensor]) -> Tensor:
    """Rotate queries and keys, and cache keys and values; returns the queries (M, H·K), in the type of the sums."""
    key_heads, capacity, head_dim = cached[0].shape[1:]
    heads = projected_MO.shape[1] // head_dim
    query_heads = heads - 2 * key_heads
    queries_MO = projected_MO.new_empty(len(projected_MO), query_heads * head_dim)
    tensors = (projected_MO, positions_BT, *rotary_CK, queries_MO, *cached)
    sizes = (query_heads, key_heads, capacity, head_dim)
    tile = (triton.next_power_of_2(heads), triton.next_power_of_2(head_dim // 2))
    _rotate[(len(projected_MO),)](tensors, positions_BT.shape[1], sizes, *tile)
    return queries_MO


def _attended(queries_MO: Tensor, positions_BT: Tensor, cached: list[Tensor]) -> Tensor:
    """Attention (M, H·K) of each row over its own prefix."""
    key_heads, capacity, head_dim = cached[0].shape[1:]
    query_heads = queries_MO.shape[1] // head_dim
    attended_MO = queries_MO.new_empty(queries_MO.shape, dtype=cached[0].dtype)
    tensors = (queries_MO, positions_BT, *cached, attended_MO)
    sizes = (query_heads, key_heads, capacity, head_dim)
    _attend[len(queries_MO), query_heads](tensors, positions_BT.shape[1], sizes, triton.next_power_of_2(head_dim))
    return attended_MO


def _tile(dtype: torch.dtype) -> tuple[int, int]:
    """How many outputs a product's tile has, and how many numbers it sums at once: by the dtype alone."""
    return {8: (16, 16), 4: (32, 32)}.get(dtype.itemsize, (32, 128))


@triton.jit
def _widen(x: tl.tensor) -> tl.tensor:
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _normalize(tensors: tl.tuple, size: tl.tensor, epsilon: tl.constexpr, BLOCK: tl.constexpr) -> None:
    x_MD, weight_D, result_MD = tensors
    columns = tl.arange(0, BLOCK)
    first, is_own = tl.program_id(0).to(tl.int64) * size, columns < size
    x_D = _widen(tl.load(x_MD + first + columns, mask=is_own, other=0.0))
    weight = _widen(tl.load(weight_D + columns, mask=is_own, other=0.0))
    scale = tl.rsqrt(tl.sum(x_D * x_D) / size + epsilon)
    tl.store(result_MD + first + columns, x_D * scale * weight, mask=is_own)


@triton.jit
def _products(x_rows: tl.tuple, weight_rows: tl.tuple, size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Σ x·w for R rows of x and S of a matrix, each of which comes as pointers to where it begins, and its mask."""
    x_R, is_row = x_rows
    weight_S, is_output = weight_rows
    is_double: tl.constexpr = x_R.dtype.element_ty == tl.float64
    sums_RS = tl.zeros((x_R.shape[0], weight_S.shape[0]), tl.float64 if is_double else tl.float32)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        is_own = columns < size
        x_RD = tl.load(x_R[:, None] + columns[None, :], mask=is_row[:, None] & is_own[None, :], other=0.0)
        w_SD = tl.load(weight_S[:, None] + columns[None, :], mask=is_output[:, None] & is_own[None, :], other=0.0)
        if is_double:
            sums_RS += tl.sum(x_RD[:, None, :] * w_SD[None, :, :], axis=2)
        else:
            sums_RS = tl.dot(x_RD, w_SD.T, sums_RS, input_precision="ieee")
    return sums_RS


@triton.jit
def _rows(matrix: tl.tensor, first: tl.tensor, last: tl.tensor, size: tl.tensor, COUNT: tl.constexpr) -> tl.tuple:
    """Pointers to where the rows from the first on begin, and which of them come before the last."""
    rows = first + tl.arange(0, COUNT)
    return matrix + rows.to(tl.int64) * size, rows < last


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    tensors: tl.tuple, num_rows: tl.tensor, sizes: tl.tuple, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    x_MD, weight_OD, added_MO, result_MO = tensors
    size_O, size_D = sizes
    row, output = tl.program_id(0) * ROWS, tl.program_id(1) * OUTPUTS
    x_rows = _rows(x_MD, row, num_rows, size_D, ROWS)
    weight_rows = _rows(weight_OD, output, size_O, size_D, OUTPUTS)
    sums_RS = _products(x_rows, weight_rows, size_D, BLOCK)
    outputs = output + tl.arange(0, OUTPUTS)
    is_own = x_rows[1][:, None] & weight_rows[1][None, :]
    if added_MO is not None:
        added_R, _ = _rows(added_MO, row, num_rows, size_O, ROWS)
        sums_RS += _widen(tl.load(added_R[:, None] + outputs[None, :], mask=is_own, other=0.0))
    result_R, _ = _rows(result_MO, row, num_rows, size_O, ROWS)
    tl.store(result_R[:, None] + outputs[None, :], sums_RS, mask=is_own)


@triton.jit(do_not_specialize=["num_rows"])
def _gate(tensors: tl.tuple, num_rows: tl.tensor, sizes: tl.tuple, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    x_MD, gate_up, result_MI = tensors
    size_I, size_D = sizes
    row, output = tl.program_id(0) * ROWS, tl.program_id(1) * OUTPUTS
    x_rows = _rows(x_MD, row, num_rows, size_D, ROWS)
    gates_S, is_output = _rows(gate_up, output, size_I, size_D, OUTPUTS)
    ups_S, _ = _rows(gate_up, size_I + output, 0, size_D, OUTPUTS)
    gates_RS = _products(x_rows, (gates_S, is_output), size_D, BLOCK)
    ups_RS = _products(x_rows, (ups_S, is_output), size_D, BLOCK)
    inner_RS = gates_RS / (1 + tl.exp(-gates_RS)) * ups_RS
    result_R, is_row = _rows(result_MI, row, num_rows, size_I, ROWS)
    outputs = output + tl.arange(0, OUTPUTS)
    tl.store(result_R[:, None] + outputs[None, :], inner_RS, mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["length"])
def _rotate(tensors: tl.tuple, length: tl.tensor, sizes: tl.tuple, HEADS: tl.constexpr, HALF: tl.constexpr) -> None:
    projected_MO, positions_M, cosines_CK, sines_CK, queries_MO, keys, values = tensors
    query_heads, key_heads, capacity, head_dim = sizes
    row, half = tl.program_id(0).to(tl.int64), head_dim // 2
    heads, columns = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    position, is_own = tl.load(positions_M + row), columns < half
    is_query, is_rotated = (heads < query_heads) & is_own, (heads < query_heads + key_heads) & is_own
    is_value = (heads >= query_heads + key_heads) & (heads < query_heads + 2 * key_heads) & is_own
    # Each half of a head is the other's partner.
    own = projected_MO + (row * (query_heads + 2 * key_heads) + heads) * head_dim + columns
    x_NK, partner_NK = tl.load(own, mask=is_rotated | is_value), tl.load(own + half, mask=is_rotated | is_value)
    cosines, sines = cosines_CK + position * head_dim + columns, sines_CK + position * head_dim + columns
    turned_NK = x_NK * tl.load(cosines, mask=is_own) - partner_NK * tl.load(sines, mask=is_own)
    partner_turned_NK = partner_NK * tl.load(cosines + half, mask=is_own) + x_NK * tl.load(sines + half, mask=is_own)
    place = queries_MO + (row * query_heads + heads) * head_dim + columns
    tl.store(place, turned_NK, mask=is_query)
    tl.store(place + half, partner_turned_NK, mask=is_query)
    first_head = row // length * key_heads - query_heads
    place = keys + ((first_head + heads) * capacity + position) * head_dim + columns
    tl.store(place, turned_NK, mask=is_rotated & ~is_query)
    tl.store(place + half, partner_turned_NK, mask=is_rotated & ~is_query)
    place = values + ((first_head - key_heads + heads) * capacity + position) * head_dim + columns
    tl.store(place, x_NK, mask=is_value)
    tl.store(place + half, partner_NK, mask=is_value)


@triton.jit(do_not_specialize=["length"])
def _attend(tensors: tl.tuple, length: tl.tensor, sizes: tl.tuple, BLOCK: tl.constexpr) -> None:
    queries_MO, positions_M, keys, values, attended_MO = tensors
    query_heads, key_heads, capacity, head_dim = sizes
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    is_own, position = columns < head_dim, tl.load(positions_M + row)
    own = (row * query_heads + head) * head_dim + columns
    query_K = tl.load(queries_MO + own, mask=is_own, other=0.0)
    cached = (row // length * key_heads + head // (query_heads // key_heads)) * capacity * head_dim
    scale = 1 / tl.sqrt(head_dim.to(query_K.dtype))
    most = tl.full((), float("-inf"), query_K.dtype)
    total = tl.zeros((), query_K.dtype)
    attended_K = tl.zeros((BLOCK,), query_K.dtype)
    for first in range(0, position + 1, KEYS):
        seen = first + tl.arange(0, KEYS)
        is_seen = seen <= position
        place = cached + seen[:, None] * head_dim + columns[None, :]
        is_read = is_seen[:, None] & is_own[None, :]
        keys_JK = tl.load(keys + place, mask=is_read, other=0.0).to(query_K.dtype)
        scores_J = tl.where(is_seen, tl.sum(keys_JK * query_K[None, :], axis=1) * scale, float("-inf"))
        greatest = tl.maximum(most, tl.max(scores_J))
        kept, powers_J = tl.exp(most - greatest), tl.exp(scores_J - greatest)
        values_JK = tl.load(values + place, mask=is_read, other=0.0).to(query_K.dtype)
        total = total * kept + tl.sum(powers_J)
        attended_K = attended_K * kept + tl.sum(powers_J[:, None] * values_JK, axis=0)
        most = greatest
    tl.store(attended_MO + own, attended_K / total, mask=is_own)
