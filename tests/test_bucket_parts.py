"""What gradient buckets are made of: where gradients lie, how large buckets are, what 8-bit integers round off."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


# ---- layout and size


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(DTYPES)), min_size=1, max_size=30),
    st.integers(1, 20_000),
    st.randoms(),
)
def test_every_gradient_has_its_place(parameters: Any, nbytes: int, random: Any) -> None:
    from abccl.collectives.buckets.layout import lay_out

    counts, dtypes = [count for count, _ in parameters], [dtype for _, dtype in parameters]
    order = list(range(len(counts)))
    random.shuffle(order)
    layouts = lay_out(counts, dtypes, order, nbytes, 512)
    assert sorted(piece.parameter for layout in layouts for piece in layout.pieces) == sorted(order)
    for layout in layouts:
        end = 0
        assert layout.count % 512 == 0
        for piece in layout.pieces:
            assert dtypes[piece.parameter] == layout.dtype and counts[piece.parameter] == piece.count
            assert piece.offset >= end and piece.offset * layout.dtype.itemsize % 64 == 0
            end = piece.offset + piece.count
        assert end <= layout.count
        # It ended with the gradient that filled it.
        assert layout.pieces[-1].offset * layout.dtype.itemsize < nbytes
        places = [order.index(piece.parameter) for piece in layout.pieces]
        assert places == sorted(places)
    full = [max(order.index(piece.parameter) for piece in layout.pieces) for layout in layouts]
    closed = [
        k for k, layout in enumerate(layouts)
        if (layout.pieces[-1].offset + layout.pieces[-1].count) * layout.dtype.itemsize >= nbytes
    ]  # fmt: skip
    assert [full[k] for k in closed] == sorted(full[k] for k in closed)


@settings(deadline=None)
@given(st.floats(1e-7, 1e-3), st.floats(1e-12, 1e-8))
def test_alpha_and_beta_are_found(alpha: float, beta: float) -> None:
    from abccl.collectives.buckets.sizing import fit

    nbytes = [1 << 16, 1 << 20, 1 << 23]
    model = fit(nbytes, [alpha + beta * n for n in nbytes])
    assert [model.seconds(n) for n in nbytes] == pytest.approx([alpha + beta * n for n in nbytes], rel=1e-6)


def test_times_that_shrink_with_size_make_no_negative_model() -> None:
    from abccl.collectives.buckets.sizing import fit

    model = fit([1000, 2000], [2.0, 1.0])
    assert model.beta == 0 and 1.0 <= model.alpha <= 2.0
    model = fit([1000, 2000], [1.0, 9.0])
    assert model.alpha == 0 and model.beta > 0


def test_exposed_is_what_is_left_after_backward() -> None:
    from abccl.collectives.buckets.layout import lay_out
    from abccl.collectives.buckets.sizing import AlphaBeta, best_bytes, exposed

    counts = [1 << 18] * 4  # a MiB each
    dtypes = [torch.float32] * 4
    ready = [0.0, 1.0, 2.0, 3.0]

    def layouts(nbytes: int) -> Any:
        return lay_out(counts, dtypes, range(4), nbytes, 1)

    quick = AlphaBeta(0.25, 0.25 / (1 << 20))
    assert exposed(layouts(1), ready, quick) == 0.5  # four of half a second: the last one is alone
    assert exposed(layouts(4 << 20), ready, quick) == 1.25  # one of all, after backward
    assert best_bytes(layouts, 4 << 20, ready, quick) == 1 << 20
    # Where each start costs a second, one reduction after backward is best: 4 + 1 + 1 against 1 + 5.
    slow = AlphaBeta(4.0, 0.25 / (1 << 20))
    assert best_bytes(layouts, 4 << 20, ready, slow) == 4 << 20
    held = AlphaBeta(0.0, 0.0, launch=0.5)
    assert exposed(layouts(1), ready, held) == 2.0  # every start holds backward up
    # Where reductions run on backward's cores nothing is hidden, and only their starts can be saved.
    sharing = AlphaBeta(0.25, 0.25 / (1 << 20), shares=True)
    assert exposed(layouts(1), ready, sharing) == 2.0
    assert best_bytes(layouts, 4 << 20, ready, sharing) == 4 << 20


# ---- 8-bit integers


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 30), st.floats(-30, 30), st.integers(1, 3), st.integers(1, 4))
def test_rounding_is_bounded_by_the_block(seed: int, exponent: float, rows: int, blocks: int) -> None:
    from abccl.collectives.buckets.quantize import BLOCK, dequantize, packed_bytes, quantize

    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, blocks * BLOCK, generator=generator) * 10**exponent
    values *= torch.rand(rows, blocks, generator=generator).repeat_interleave(BLOCK, 1)
    left, packed = torch.zeros_like(values), torch.empty(rows, packed_bytes(blocks * BLOCK), dtype=torch.uint8)
    quantize(left, values, packed)
    out = torch.empty_like(values)
    for row, target in zip(packed, out):
        dequantize(row.unsqueeze(0), target)
    largest = values.view(rows, blocks, BLOCK).abs().amax(2, keepdim=True)
    error = (out - values).view(rows, blocks, BLOCK).abs()
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert torch.allclose(left, values - out, rtol=0, atol=float(largest.max()) * 1e-6)


def test_zeros_tiny_and_infinite_blocks() -> None:
    from abccl.collectives.buckets.quantize import BLOCK, dequantize, packed_bytes, quantize

    values = torch.randn(5, BLOCK)
    values[0] = 0.0
    values[1] *= 1e-40
    values[2, 7], values[3, 9] = float("inf"), float("nan")
    left, packed = torch.zeros(1, 5 * BLOCK), torch.empty(1, packed_bytes(5 * BLOCK), dtype=torch.uint8)
    quantize(left, values.view(1, -1), packed)
    out = torch.empty(5, BLOCK)
    dequantize(packed, out)
    left = left.view(5, BLOCK)
    assert not out[:2].any() and torch.equal(left[1], values[1])  # too small for a scale: kept for later
    assert not torch.isfinite(out[2:4]).any() and not left[2:4].any()
    assert torch.isfinite(out[4]).all()
