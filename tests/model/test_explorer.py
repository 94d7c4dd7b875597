"""The explorer computes what bitsandbytes does where that knows the type, and its widget shows what the function computes."""
import sys

import pytest
import torch

import bitsandbytes.functional as bnb
from qlora_kit.data.files import UserError
from qlora_kit.model.explorer import (
    bits_per_weight, codebook_of, explore, explore_layers, first_rows, matrices, rebuild,
    with_outliers)
from qlora_kit.model.nf4 import block_sizes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def theirs(x, size, kind, double):
    """(rebuilt, stored bytes); flattened, because the CPU kernel of bitsandbytes 0.50.2 takes wrong scales where a row is no whole number of blocks."""
    codes, state = bnb.quantize_4bit(x.float().flatten(), blocksize=size, quant_type=kind, compress_statistics=double)
    parts = [codes, state.absmax] + ([state.state2.absmax, state.offset] if double else [])
    return bnb.dequantize_4bit(codes, state).view(x.shape), sum(t.nbytes for t in parts)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
@pytest.mark.parametrize("size", block_sizes)
def test_equal_to_bitsandbytes(size, kind, double):
    for x in (torch.randn(96, 192) * 0.02, torch.randn(63, 66), torch.randn(128, 128).bfloat16()):
        rebuilt, stored = theirs(x, size, kind, double)
        assert torch.equal(rebuild(x, codebook_of(kind), block_size=size, double_quant=double), rebuilt)
        found, y = explore(x, size, kind, double_quant=double), x.double()
        assert found.bits == pytest.approx(8 * stored / x.numel()) == bits_per_weight(x.numel(), size, double)
        assert found.error == pytest.approx(((rebuilt - y).norm() / y.norm()).item(), rel=1e-5)
        assert found.largest == pytest.approx((rebuilt - y).abs().max().item() / y.square().mean().sqrt().item(), rel=1e-5)


def test_int4_is_rounding_to_fifteen_even_steps():
    x = torch.randn(64 * 40)
    scale = x.view(-1, 64).abs().amax(1, keepdim=True)
    plain = ((x.view(-1, 64) / scale * 7).round() / 7 * scale).flatten()
    torch.testing.assert_close(rebuild(x, codebook_of("int4")), plain, atol=1e-6, rtol=1e-6)
    assert len(codebook_of("int4")) == len(codebook_of("fp4")) == 15 and len(codebook_of("nf4")) == 16


@pytest.mark.parametrize("kind", ["int4", "fp4", "nf4"])
def test_shares_are_shares(kind):
    found = explore(torch.randn(300, 70), quant_type=kind, outlier=20)
    assert sum(found.used) == pytest.approx(1, abs=1e-5) and sum(found.shares) == pytest.approx(1, abs=1e-5)
    assert found.levels == codebook_of(kind).tolist() and len(found.used) == len(found.levels)


def test_outliers_are_left_out_of_the_error_and_the_weights_are_left_alone():
    x = torch.randn(3 * 4096)
    before = x.clone()
    moved, rest = with_outliers(x, 20)
    assert (~rest).nonzero().flatten().tolist() == [0, 4096, 8192] and torch.equal(moved[rest], x[rest])
    assert moved[0] == pytest.approx(20 * x.square().mean().sqrt().item(), rel=1e-6)
    errors = {size: explore(x, size, outlier=20).error for size in (32, 64, 4096)}
    assert errors[32] < errors[64] < errors[4096] and explore(x, 64).error < errors[64] and torch.equal(x, before)
    y = x.clone(); y[::4096] = moved[::4096]
    rebuilt = rebuild(y, codebook_of("nf4"), double_quant=True)
    assert errors[64] == pytest.approx(((rebuilt - y)[rest].norm() / y[rest].norm()).item(), rel=1e-5)


def test_odd_matrices():
    assert explore(torch.zeros(10, 10)).error == 0
    assert explore(torch.ones(1)).bits == 8 * (1 + 1 + 4 + 4)
    for bad, said in ((dict(quant_type="int3"), "allowed are int4, fp4 and nf4"), (dict(block_size=48), "allowed are 32"), (dict(outlier=-2), "outlier=-2"), (dict(outlier=float("nan")), "outlier=nan")):
        with pytest.raises(UserError, match=said):
            explore(torch.randn(64), **bad)
    with pytest.raises(UserError, match="value 1 of 2 is inf"):
        explore(torch.tensor([1.0, float("inf")]))
    with pytest.raises(UserError, match="without weights"):
        explore(torch.empty(0, 4))


@pytest.fixture
def weights():
    return {"a.10.weight": torch.randn(8, 64), "a.9.weight": torch.randn(300, 64), "a.9.bias": torch.zeros(8), "<b>x</b>.weight": torch.randn(64, 64).bfloat16()}


def test_matrices_of_a_dictionary_and_of_a_checkpoint(weights, tiny_llama):
    from qlora_kit.model.loader import Tensors

    assert matrices(weights) == ["<b>x</b>.weight", "a.9.weight", "a.10.weight"]
    tensors = Tensors(tiny_llama)
    names = matrices(tensors)
    assert names and all(tensors.whole(n).ndim == 2 for n in names) and len(names) == sum(tensors.whole(n).ndim == 2 for n in tensors)
    assert torch.equal(first_rows(tensors[names[0]]), tensors.whole(names[0]))
    assert first_rows(weights["a.9.weight"], 128).shape == (2, 64) and first_rows(weights["a.9.weight"], 1).shape == (1, 64)
    with pytest.raises(UserError, match="no matrix"):
        matrices({"x": torch.zeros(3)})
    with pytest.raises(UserError, match="layer='b'"):
        explore_layers(weights, "b")


def test_the_widget_shows_what_the_function_computes(weights):
    pytest.importorskip("ipywidgets")
    explorer = explore_layers(weights)
    layer, row, size, double, outlier, page = explorer.widget().children
    kind = row.children[1]
    assert layer.value == "a.9.weight"

    def shown(**settings):
        numbers = explorer.show(layer.value, **settings).numbers()
        return all(f">{value}</b>" in page.value for value in numbers.values())

    assert shown()
    size.value, outlier.value, kind.value, double.value = 256, 12, "int4", False
    assert shown(block_size=256, outlier=12, quant_type="int4", double_quant=False) and not shown()
    layer.value = "<b>x</b>.weight"
    assert "&lt;b&gt;x" in page.value and "<b>x</b>" not in page.value
    weights["a.10.weight"][0, 0] = float("nan")
    layer.value = "a.10.weight"
    assert "⚠ value 0 of 512 is nan" in page.value


def test_without_ipywidgets_a_figure_is_shown(weights, monkeypatch):
    explorer = explore_layers(weights)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "<svg" in bundle["text/html"] and "aria-label=" in bundle["text/html"] and "bits a weight" in bundle["text/plain"]
    with pytest.raises(UserError, match="pip install ipywidgets"):
        explorer.widget()
