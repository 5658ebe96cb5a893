"""The attention libraries as modules that compute on any device: their signatures, tensor layouts, log-sum-exp layouts
and demands, over `plain_kernel`. So the adapters run without a GPU.

A demand that a library makes is an assertion here; what a library leaves unwritten is NaN here.
"""

from __future__ import annotations

import functools
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from far_scale.model.layout import Spans
from harness import plain_kernel


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Put a module with these contents in the place of a library's."""
    module = ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def _spans(starts: Tensor, longest: int) -> Spans:
    assert starts.dtype == torch.int32 and starts.is_contiguous()
    spans = Spans(tuple(starts.diff().tolist()))
    assert spans.longest == longest
    return spans


def _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal) -> tuple[Tensor, Tensor]:
    """out `[T, N, D]`, lse `[N, T]`, as flash-attn gives them."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert scale is None or math.isclose(scale, q.shape[-1] ** -0.5)
    spans = _spans(cu_seqlens_q, max_seqlen_q), _spans(cu_seqlens_k, max_seqlen_k)
    out, lse = plain_kernel.forward(q, k, v, *spans, causal)
    return out, lse.T.contiguous()


def _backward(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal
) -> tuple[Tensor, Tensor, Tensor]:
    """lse `[N, T]`."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    assert math.isclose(scale, q.shape[-1] ** -0.5)
    spans = _spans(cu_seqlens_q, max_seqlen_q), _spans(cu_seqlens_k, max_seqlen_k)
    return plain_kernel.backward(dout, q, k, v, out, lse.T, *spans, causal)


def _pad(lse: Tensor, spans: Spans, width: int) -> Tensor:
    """`[N, T]` -> `[sequences, N, width]`."""
    padded = lse.new_full((len(spans.lengths), len(lse), width), torch.nan)
    for sequence, (start, length) in enumerate(zip(spans.starts, spans.lengths, strict=False)):
        padded[sequence, :, :length] = lse[:, start : start + length]
    return padded


def _unpad(lse: Tensor, spans: Spans) -> Tensor:
    """`[sequences, N, width]` -> `[N, T]`."""
    return torch.cat([lse[i, :, :length] for i, length in enumerate(spans.lengths)], dim=1).contiguous()


def flash_attn_2(monkeypatch: pytest.MonkeyPatch, version: str) -> list[bool]:
    """flash-attn 2.5, 2.6 or 2.7 and later. Returns where each backward's `deterministic` is noted."""
    noted: list[bool] = []

    def write(found, dq, dk, dv, deterministic) -> None:
        noted.append(deterministic)
        for place, gradient in zip((dq, dk, dv), found, strict=True):
            assert place.is_contiguous()
            place.copy_(gradient)

    def forward_25(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        alibi_slopes, return_softmax, block_table,
    ):  # fmt: skip
        assert dropout_p == 0 and window_size == (-1, -1) and alibi_slopes is block_table is None
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = _forward(q, k, v, *sequences, softmax_scale, causal)
        lse = _pad(lse, _spans(cu_seqlens_q, max_seqlen_q), max_seqlen_q)
        return out, q, k, v, out, lse, None, None

    def backward_25(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert dropout_p == 0 and window_size == (-1, -1) and alibi_slopes is None
        spans = _spans(cu_seqlens_q, max_seqlen_q)
        assert softmax_lse.shape == (len(spans.lengths), q.shape[1], max_seqlen_q) and softmax_lse.is_contiguous()
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        found = _backward(dout, q, k, v, out, _unpad(softmax_lse, spans), *sequences, softmax_scale, causal)
        write(found, dq, dk, dv, deterministic)
        return dq, dk, dv, None

    def forward_26(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, return_softmax, block_table,
    ):  # fmt: skip
        assert dropout_p == 0 and window_size == (-1, -1) and softcap == 0 and alibi_slopes is block_table is None
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = _forward(q, k, v, *sequences, softmax_scale, causal)
        return out, q, k, v, out, lse, None, None

    def backward_26(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert dropout_p == 0 and window_size == (-1, -1) and softcap == 0 and alibi_slopes is None
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        found = _backward(dout, q, k, v, out, softmax_lse, *sequences, softmax_scale, causal)
        write(found, dq, dk, dv, deterministic)
        return dq, dk, dv, None

    def forward_27(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *_forward(q, k, v, *sequences, softmax_scale, causal), None, None

    def backward_27(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        found = _backward(dout, q, k, v, out, softmax_lse, *sequences, softmax_scale, causal)
        write(found, dq, dk, dv, deterministic)
        return found[0].new_empty(q.shape[1], len(q))

    forward, backward = {
        "2.5": (forward_25, backward_25),
        "2.6": (forward_26, backward_26),
        "2.7": (forward_27, backward_27),
        "2.8": (forward_27, backward_27),
    }[version[:3]]
    _module(monkeypatch, "flash_attn", __version__=version)
    contents = {"_flash_attn_varlen_forward": forward, "_flash_attn_varlen_backward": backward}
    _module(monkeypatch, "flash_attn.flash_attn_interface", **contents)
    return noted


_flash_attn_3_noted: list[bool] = []


@functools.cache
def _flash_attn_3_operators() -> torch.library.Library:
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
        "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
        "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
        "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
        "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
        "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
        "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
        "-> (Tensor(out!), Tensor, Tensor, Tensor)"
    )
    library.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
        "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
        "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
        "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def forward(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, **rest):
        assert rest["num_splits"] == 1 and all(x is None for x in rest.values() if x is None or isinstance(x, Tensor))
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *_forward(q, k, v, *sequences, softmax_scale, is_causal), q.new_empty(0), q.new_empty(0)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv,
        *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, deterministic, **rest,
    ):  # fmt: skip
        assert dout.stride(-1) == out.stride(-1) == 1
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        found = _backward(dout, q, k, v, out, softmax_lse, *sequences, softmax_scale, is_causal)
        for place, gradient in zip((dq, dk, dv), found, strict=True):
            place.copy_(gradient)
        _flash_attn_3_noted.append(deterministic)
        return tuple(q.new_empty(0) for _ in range(5))

    for name, function in (("fwd", forward), ("bwd", backward)):
        library.impl(name, _by_name(library, name, function), "CPU")
    return library


def _by_name(library: torch.library.Library, name: str, function):
    """The dispatcher hands arguments over by place and leaves out those that have their default."""
    schema = getattr(torch.ops.flash_attn_3, name).default._schema
    places = function.__code__.co_argcount

    def called(*args, **kwargs):
        given = {argument.name: argument.default_value for argument in schema.arguments}
        given |= dict(zip(given, args, strict=False)) | kwargs
        values = list(given.values())
        return function(*values[:places], **dict(list(given.items())[places:]))

    return called


def flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """flash-attn 3's operators. Returns where each backward's `deterministic` is noted."""
    _flash_attn_3_operators()
    _module(monkeypatch, "flash_attn_3")
    _module(monkeypatch, "flash_attn_3._C")
    _flash_attn_3_noted.clear()
    return _flash_attn_3_noted


def flash_attn_4(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """flash-attn 4.0.0b36. Returns where each backward's `deterministic` is noted."""
    noted: list[bool] = []

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
    ):  # fmt: skip
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = _forward(q, k, v, *sequences, softmax_scale, causal)
        return out, lse if return_lse or q.requires_grad else None, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        noted.append(deterministic)
        assert q.dtype == k.dtype == v.dtype == out.dtype == dout.dtype
        sequences = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return _backward(dout, q, k, v, out, lse, *sequences, softmax_scale, causal)

    for name in ("flash_attn", "flash_attn.cute"):
        _module(monkeypatch, name)
    _module(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    return noted


def xformers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """xFormers 0.0.35. Returns where the operator of each call is noted."""
    noted: list[str] = []

    class BlockDiagonalMask:
        causal = False

        def __init__(self, q_seqlen: list[int], kv_seqlen: list[int]) -> None:
            self.queries, self.keys = Spans(tuple(q_seqlen)), Spans(tuple(kv_seqlen))
            self.q_seqinfo = SimpleNamespace(seqstart=None)
            self.k_seqinfo = self.q_seqinfo if q_seqlen == kv_seqlen else SimpleNamespace(seqstart=None)

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None) -> BlockDiagonalMask:
            assert device is not None, "the library would take the current GPU"
            return cls(q_seqlen, kv_seqlen or q_seqlen)

    class BlockDiagonalCausalMask(BlockDiagonalMask):
        causal = True  # top left

    def operators(name: str, packed: bool) -> SimpleNamespace:
        kinds = {"VARLEN_LSE_PACKED": packed, "is_available": staticmethod(lambda: True)}
        return SimpleNamespace(**{kind: type(kind, (), kinds | {"NAME": name + kind[0]}) for kind in ("FwOp", "BwOp")})

    flash, cutlass = operators("flash", packed=True), operators("cutlass", packed=False)

    def check(tensors: list[Tensor], mask: BlockDiagonalMask, op: type) -> None:
        noted.append(op.NAME)
        assert all(x.dim() == 4 and len(x) == 1 for x in tensors)
        for info, spans in ((mask.q_seqinfo, mask.queries), (mask.k_seqinfo, mask.keys)):
            assert info.seqstart.tolist() == list(spans.starts) and info.seqstart.dtype == torch.int32
        assert not mask.causal or mask.queries == mask.keys

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        check([query, key, value], attn_bias, op)
        queries, keys = attn_bias.queries, attn_bias.keys
        out, lse = plain_kernel.forward(query[0], key[0], value[0], queries, keys, attn_bias.causal)
        lse = lse.T.contiguous()
        width = -(-queries.longest // 32) * 32
        return out[None], lse[None] if op.VARLEN_LSE_PACKED else _pad(lse, queries, width)

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        check([grad, output, query, key, value], attn_bias, op)
        assert grad.is_contiguous() and output.is_contiguous() and lse.is_contiguous()
        queries, keys = attn_bias.queries, attn_bias.keys
        if op.VARLEN_LSE_PACKED:
            assert lse.shape == (1, query.shape[2], query.shape[1])
            lse = lse[0]
        else:
            assert lse.shape == (len(queries.lengths), query.shape[2], -(-queries.longest // 32) * 32)
            lse = _unpad(lse, queries)
        tensors = (x[0] for x in (grad, query, key, value, output))
        found = plain_kernel.backward(*tensors, lse.T, queries, keys, attn_bias.causal)
        return tuple(x[None] for x in found)

    for name in ("xformers", "xformers.ops"):
        _module(monkeypatch, name)
    _module(monkeypatch, "xformers._cpp_lib", _built_with_cuda=True)
    _module(
        monkeypatch,
        "xformers.ops.fmha",
        attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask, BlockDiagonalCausalMask=BlockDiagonalCausalMask),
        flash=flash,
        cutlass=cutlass,
        memory_efficient_attention_forward_requires_grad=memory_efficient_attention_forward_requires_grad,
        memory_efficient_attention_backward=memory_efficient_attention_backward,
    )
    return noted
