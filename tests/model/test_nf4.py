"""nf4 against bitsandbytes where they are easiest to tell apart: edges between levels, short last blocks, other block sizes."""
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_kit.data.files import UserError
from qlora_kit.model.nf4 import (
    block_sizes, dequantize, double_quantize, dynamic_map, nf4_codebook, quantize,
    undo_double_quantize)

dtypes = torch.float32, torch.bfloat16, torch.float16
middles = (nf4_codebook()[:-1] + nf4_codebook()[1:]) / 2


def same_bytes(ours, theirs):
    return ours.dtype == theirs.dtype and torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def assert_equal(x, block_size=64):
    q = quantize(x, block_size)
    s = double_quantize(q.absmax)
    codes, plain = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
    _, double = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    with torch.compiler.set_stance("force_eager"):
        rebuilt, rebuilt8 = bnb.dequantize_4bit(codes, plain), bnb.dequantize_4bit(codes, double)
    q8 = replace(q, absmax=undo_double_quantize(*s))
    for ours, theirs in ((q.codes, codes), (q.absmax, plain.absmax), (s.codes, double.absmax), (s.absmax2, double.state2.absmax),
                         (s.offset, double.offset), (dequantize(q), rebuilt), (dequantize(q8), rebuilt8)):
        assert same_bytes(ours, theirs)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("block_size", block_sizes)
def test_every_block_size_full_short_and_zero(dtype, block_size):
    torch.manual_seed(block_size)
    for n in (1, block_size - 1, block_size, block_size + 1, 3 * block_size, 70 * block_size + 17):
        x = torch.randn(n) * 0.02
        x[block_size:2 * block_size] = 0
        assert_equal(x.to(dtype), block_size)
        assert_equal(torch.zeros(n, dtype=dtype), block_size)


def test_full_blocks_multiply_by_the_inverse():
    edges = torch.nn.functional.pad(middles, (0, 1), value=1.).repeat(4) * (torch.rand(20_000, 1, generator=torch.manual_seed(0)) + 0.01)
    assert_equal(edges.reshape(-1))
    assert_equal(edges.reshape(128, -1).T)  # rows of whole blocks: bitsandbytes 0.50.2 decodes others wrongly on CPUs with AVX-512


def test_short_last_block_divides():
    torch.manual_seed(0)
    for n in range(16, 64, 2):
        for _ in range(10):
            assert_equal(torch.cat([middles, torch.ones(n - 15)]) * (torch.rand(1) + 0.01))


def test_matrix_keeps_shape_dtype_and_the_order_of_rows():
    w = torch.randn(6, 4, 40).transpose(0, 1).to(torch.bfloat16)
    assert not w.is_contiguous()
    rebuilt = dequantize(quantize(w))
    assert rebuilt.shape == w.shape and rebuilt.dtype == w.dtype
    assert same_bytes(rebuilt, dequantize(quantize(w.contiguous())))


@pytest.mark.parametrize("scales", [torch.zeros(5), torch.full((700,), 0.5), torch.rand(1), torch.rand(513), torch.rand(256)**8])
def test_scales_that_are_equal_zero_or_few(scales):
    s = double_quantize(scales)
    codes, state = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert same_bytes(s.codes, codes) and same_bytes(s.absmax2, state.absmax)
    assert same_bytes(undo_double_quantize(*s), bnb.dequantize_blockwise(codes, state) + scales.mean())


def test_a_million_scales():
    scales = torch.rand(1_000_003, generator=torch.manual_seed(0))
    s = double_quantize(scales)
    assert same_bytes(s.codes, bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)[0])
    assert (undo_double_quantize(*s) - scales).abs().max() < 0.5 * dynamic_map().diff().max()


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [3, 64, 129])
def test_non_finite_is_refused_and_found(dtype, bad, where):
    x = torch.ones(130, dtype=dtype)
    x[where] = bad
    with pytest.raises(UserError, match=f"value {where} of 130 is {bad}"): quantize(x)


@pytest.mark.parametrize("block_size", [0, -64, 63, 96, 8192])
def test_block_size_that_no_kernel_knows(block_size):
    with pytest.raises(UserError, match=f"block_size={block_size}; allowed"): quantize(torch.ones(128), block_size)
