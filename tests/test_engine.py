"""Engines: unequal targets, state out and in, weight decay, and two ranks whose shards do not divide."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.engine import LocalEngine, free_port, make_optimizer, shard


class Net(torch.nn.Module):
    """Sizes that two ranks cannot divide; a summed loss over the rows that count."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1))
        self.model[0].weight.requires_grad_(False)
    def forward(self, x, y): return ((self.model(x) - y)**2).sum()


def make(weight_decay=0.0, max_grad_norm=1.0):
    module = Net()
    return LocalEngine(module, make_optimizer(module, weight_decay), max_grad_norm)


def data(n=7):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=g), torch.randn(n, 1, generator=g)


def accumulate(engine, parts, n):
    for i, (x, y) in enumerate(parts): engine.backward(engine.forward(dict(x=x, y=y)), n=n, last=i == len(parts)-1)


def test_unequal_micro_batches_give_the_gradient_of_the_whole():
    x, y = data()
    grads = []
    for sizes in ([7], [5, 2], [1, 1, 5]):
        engine = make()
        accumulate(engine, list(zip(x.split(sizes), y.split(sizes))), n=7)
        grads.append({k: p.grad for k, p in engine.module.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        for k, g in grads[0].items(): torch.testing.assert_close(other[k], g, rtol=1e-5, atol=1e-6) # sums of seven terms in another order


def test_state_round_trip_is_exact_and_shares_no_memory():
    x, y = data()
    engine = make(weight_decay=0.1)
    for _ in range(3): accumulate(engine, [(x, y)], 7); engine.step(0.1)
    saved = engine.state()
    before = {k: v.clone() for k, v in saved.items()}
    again = make(weight_decay=0.1)
    again.load(saved, step=3)
    for e in (engine, again):
        for _ in range(3): accumulate(e, [(x, y)], 7); norm = e.step(0.1)
    a, b = engine.state(), again.state()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(saved[k], before[k]) for k in saved), "the engine wrote into the state it was given"
    assert "param/0.weight" not in saved and any(v.any() for k, v in saved.items() if k.startswith("exp_avg_sq/"))


def test_state_before_the_first_step_has_zero_moments():
    state = make().state()
    assert {k.split("/")[0] for k in state} == {"param", "exp_avg", "exp_avg_sq"} and not any(v.any() for k, v in state.items() if k.startswith("exp"))


def test_only_matrices_decay():
    engine = make(weight_decay=0.5)
    groups = {g["weight_decay"]: [tuple(p.shape) for p in g["params"]] for g in engine.optimizer.param_groups}
    assert groups == {0.5: [(1, 5)], 0.0: [(5,), (5,), (5,), (1,)]}
    before = engine.gather()
    for p in engine.module.parameters(): p.grad = torch.zeros_like(p)
    engine.step(0.1)
    after = engine.gather()
    assert torch.equal(after["1.weight"], before["1.weight"]) and torch.allclose(after["2.weight"], before["2.weight"]*(1-0.1*0.5))


def test_step_clips_and_reports_the_norm_from_before():
    x, y = data()
    engine = make(max_grad_norm=1e-3)
    accumulate(engine, [(x, 100*y)], 7)
    grads = [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]
    norm = engine.step(0.0)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-5) and norm > 1
    first = engine.state()["exp_avg/2.weight"] # (1 - 0.9) of the clipped gradient
    torch.testing.assert_close(first, 0.1*grads[-2]*1e-3/norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("n,ranks", [(3, 2), (10, 4), (1, 3), (8, 2), (5, 1)])
def test_shards_put_together_are_the_whole(n, ranks):
    whole = torch.arange(1., n+1)
    runs = [shard(whole, r, ranks) for r in range(ranks)]
    assert len({len(r) for r in runs}) == 1 and torch.equal(torch.cat(runs)[:n], whole) and not torch.cat(runs)[n:].any()


RANK = """
import json, sys
sys.path.insert(0, sys.argv[2])
from safetensors.torch import load_file, save_file
from qlora_kit.engine import DeepSpeedEngine, find_place, leave, make_optimizer
from qlora_kit.zero import zero_config
from test_engine import Net
tensors, place, net = load_file(sys.argv[1]), find_place(several=True), Net()
engine = DeepSpeedEngine(net, make_optimizer(net, 0.1), zero_config(accumulation=2, hidden_size=1), place)
engine.load({k: v for k, v in tensors.items() if "/" in k}, step=3)
rows = ([0, 1], [2, 3]) if place.rank == 0 else ([4, 5], [6])
for step in range(2):
    for i, part in enumerate(rows): engine.backward(engine.forward({k: tensors[k][part] for k in "xy"}), n=7, last=i == 1)
    norm = engine.step(0.1)
assert engine.total(place.rank + 1) == 3
state = engine.state()
if place.rank == 0: save_file(state, sys.argv[1] + ".out"); print(json.dumps(norm))
leave()
"""


@pytest.mark.ranks
def test_two_ranks_take_over_from_one_process_and_go_on(tmp_path):
    """Accumulation, seven rows over two ranks, sizes 5 and 1; fp32 sums in another order, enlarged by two steps of Adam."""
    x, y = data()
    engine = make(weight_decay=0.1)
    for _ in range(3): accumulate(engine, [(x, y)], 7); engine.step(0.1)
    file = tmp_path / "state.safetensors"
    save_file({**engine.state(), "x": x, "y": y}, file)
    for _ in range(2): accumulate(engine, [(x, y)], 7); norm = engine.step(0.1)
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(file), os.path.dirname(__file__)], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    said = [p.communicate(timeout=400) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], said
    assert json.loads(said[0][0].splitlines()[-1]) == pytest.approx(norm, rel=1e-4)
    theirs, ours = load_file(f"{file}.out"), engine.state()
    assert theirs.keys() == ours.keys()
    for k in ours: torch.testing.assert_close(theirs[k], ours[k], rtol=1e-4, atol=1e-5)
