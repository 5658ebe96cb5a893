"""The kernel for CPUs: PyTorch's flash attention operator, run once for each pair of sequence lengths.

The operator takes dense batches `[sequences, N, length, D]` in float32, float64, bfloat16 or float16 and gives the
log-sum-exp `[sequences, N, length]` (natural; float64 for float64, else float32). Sequences of one length already
form a dense batch (no copy). Of mixed lengths there is a batch for each pair of query and key length, which is gathered
where its sequences are not neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from far_scale.model.attention.kernel import unsupported_dtype
from far_scale.model.layout import Spans

NAME, PACKAGE, INSTALL = "cpu", "torch", ""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See `Kernel.unusable_reason`."""
    if device.type != "cpu":
        return "runs only on CPUs"
    return None if dtype in DTYPES else unsupported_dtype(dtype, DTYPES)


def _dense(x: Tensor, spans: Spans) -> Tensor:
    """`[sequences * length, N, D]` -> `[sequences, N, length, D]`, a view."""
    by_sequence: Tensor = x.unflatten(0, (-1, spans.longest))
    return by_sequence.transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """`[sequences, N, length, ...]` -> `[sequences * length, N, ...]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _uniform_parts(queries: Spans, keys: Spans) -> Iterator[tuple[Tensor | slice, Spans, Tensor | slice, Spans]]:
    """Sequences grouped by query and key length: query rows and spans, key rows and spans."""
    by_lengths: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for lengths, starts in zip(
        zip(queries.lengths, keys.lengths, strict=True), zip(queries.starts, keys.starts, strict=True), strict=False
    ):
        by_lengths.setdefault(lengths, []).append(starts)
    for (query_length, key_length), starts_of_pairs in sorted(by_lengths.items()):
        query_starts, key_starts = zip(*starts_of_pairs, strict=True)
        yield (
            _rows(query_starts, query_length),
            Spans((query_length,) * len(query_starts)),
            _rows(key_starts, key_length),
            Spans((key_length,) * len(key_starts)),
        )


def _rows(starts: tuple[int, ...], length: int) -> Tensor | slice:
    """The rows of sequences of a length; as a slice, which is not copied, where they are neighbours."""
    end = starts[0] + len(starts) * length
    if starts == tuple(range(starts[0], end, length)):
        return slice(starts[0], end)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    if queries.uniform and keys.uniform:
        out, lse = _forward(_dense(q, queries), _dense(k, keys), _dense(v, keys), 0.0, causal)
        return _flat(out), _flat(lse)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, part_queries, key_rows, part_keys in _uniform_parts(queries, keys):
        out[rows], lse[rows] = forward(q[rows], k[key_rows], v[key_rows], part_queries, part_keys, causal)
    return out, lse


# Below this many tokens the operator's backward in bfloat16 is slower than in float32, 10 times so on frames of 16
# tokens (measured with torch 2.13 on a Xeon that multiplies bfloat16 matrices in hardware).
SHORT = 512


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Spans, keys: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    if q.dtype in (torch.bfloat16, torch.float16) and queries.longest < SHORT:
        precise_dout, precise_q, precise_k, precise_v, precise_out = (x.float() for x in (dout, q, k, v, out))
        dq, dk, dv = backward(precise_dout, precise_q, precise_k, precise_v, precise_out, lse, queries, keys, causal)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    if queries.uniform and keys.uniform:
        by_query = (_dense(x, queries) for x in (dout, q))
        # The operator ignores the strides of the log-sum-exp, so it must be contiguous.
        dq, dk, dv = _backward(
            *by_query, _dense(k, keys), _dense(v, keys), _dense(out, queries), _dense(lse, queries).contiguous(),
            0.0, causal,
        )  # fmt: skip
        return _flat(dq), _flat(dk), _flat(dv)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, part_queries, key_rows, part_keys in _uniform_parts(queries, keys):
        parts = dout[rows], q[rows], k[key_rows], v[key_rows], out[rows], lse[rows]
        dq[rows], dk[key_rows], dv[key_rows] = backward(*parts, part_queries, part_keys, causal)
    return dq, dk, dv
