"""Weights in rows: linears whose row moves between the two passes, and modules that a row must leave alone."""
from copy import copy, deepcopy
from functools import partial

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.model.flat import FlatWeights, flat_of, keep_scales, move_in, on_demand, packed_segments, packed_weight, row_of


def put_in_a_row(line):
    """The same module, its weight in a row of its own."""
    flat = FlatWeights()
    if isinstance(line, Linear4bit):
        like, state = Params4bit(torch.empty(line.weight.quant_state.shape, device="meta"), quant_type="nf4"), copy(line.weight.quant_state)
        state.state2 = copy(state.state2)
        segments = packed_segments(flat, like)
        flat.share = torch.zeros(flat.part, dtype=torch.uint8)
        flat.keep_part(segments[0], line.weight.data)
        keep_scales(flat, segments, state)
        move_in(flat, line, partial(packed_weight, like=like, state=state, segments=segments))
    else:
        segment = flat.add(line.weight.shape, line.weight.dtype)
        flat.share = torch.zeros(flat.part, dtype=torch.uint8)
        flat.keep_part(segment, line.weight.data)
        move_in(flat, line, partial(FlatWeights.view, segment=segment))
    return flat


def four_bits(): return Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
def conv(): return Conv1D(64, 128)
def plain(): return nn.Linear(128, 64)


@pytest.mark.parametrize("bias", ["frozen", "trained"])
@pytest.mark.parametrize("make", [plain, conv, four_bits])
def test_a_row_that_moves_between_the_passes_changes_no_gradient(make, bias):
    """Also where bitsandbytes' own forward runs: it keeps a reference to the packed bytes, which nobody checks. Same products in fp32, so equal to the last bits."""
    torch.manual_seed(0)
    line = make()
    line.support_avx512bf16_for_cpu = False
    line.requires_grad_(False)
    line.bias.requires_grad_(bias == "trained")
    twin = deepcopy(line)
    x = torch.randn(2, 5, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    twin(y).square().sum().backward()
    flat = put_in_a_row(line)
    first, second = (torch.empty(flat.part, dtype=torch.uint8) for _ in range(2))
    first.copy_(flat.share); second.copy_(flat.share)
    flat.set_data(first)
    loss = line(x).square().sum()
    first.random_(256)  # another layer is in this buffer now
    flat.set_data(second)
    loss.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    if bias == "trained": torch.testing.assert_close(line.bias.grad, twin.bias.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad(): assert torch.equal(line(x), twin(x))


def test_a_view_that_autograd_has_kept_of_a_moved_row_is_an_error_and_not_a_wrong_gradient():
    """What reads a weight by itself, past the linear's own forward."""
    line = plain().requires_grad_(False)
    flat, buffer = put_in_a_row(line), torch.empty(4*128*64, dtype=torch.uint8)
    from qlora_kit.model.flat import gather

    flat.set_data(buffer)
    gather(flat, buffer)
    x = torch.ones(1, 128, requires_grad=True)
    loss = torch.nn.functional.linear(x, line.weight).sum()
    gather(flat, buffer)  # the same memory, filled again
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


def test_another_models_attribute_called_flat_is_no_row():
    model = nn.Sequential(nn.Flatten(), plain())
    model[0].flat, model.flat = True, model[1].weight
    with on_demand(model): assert model(torch.ones(1, 128)).shape == (1, 64)
    assert row_of(model) is row_of(model[0]) is flat_of(model) is None


def test_a_linear_that_computes_in_its_own_way_stays_whole():
    from qlora_kit.model.sharded import _divisible

    class Normed(nn.Linear):
        def forward(self, x): return super().forward(x)/self.weight.norm()

    assert not _divisible(Normed(4, 4), inside=True) and _divisible(Normed(4, 4), inside=False)
    assert all(_divisible(make(), inside=True) for make in (plain, conv, four_bits)) and not _divisible(nn.LayerNorm(4), inside=False)
