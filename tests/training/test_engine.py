"""Engines: unequal targets, state out and in, weight decay, and two ranks whose shards do not divide."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.training.engine import free_port, LocalEngine, make_optimizer, sharing


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


def test_more_ranks_than_cards_is_said_once_and_plainly():
    assert sharing(2, 1) == "2 ranks share 1 card over gloo: right for learning and tests, not for speed"
    assert sharing(2, 2) is None and sharing(2, 0) is None, "CPU ranks share nothing"


class Half(Net):
    """Products in fp16 on fp32 weights, as an adapter on a 16-bit base."""
    def forward(self, x, y):
        out = torch.nn.functional.linear(self.model[:2](x).half(), self.model[2].weight.half(), self.model[2].bias.half())
        return ((out.float() - y)**2).sum()


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale():
    x, y = data()
    module = Half()
    engine, before = LocalEngine(module, make_optimizer(module), fp16=True), module.model[2].weight.clone()
    engine.scale = {"scale": 2.0**24, "since": 3}
    assert engine.scale == {"scale": 2.0**24, "since": 3, "updates": 0}
    accumulate(engine, [(x, y)], 7)
    assert not abs(engine.step(0.1)) < float("inf") and engine.skipped and engine.scale["scale"] == 2.0**23
    assert torch.equal(module.model[2].weight, before) and not engine.optimizer.state
    engine.scale = {"scale": 2.0**6, "since": 0}
    accumulate(engine, [(x, y)], 7)
    other = Half()
    plain = LocalEngine(other, make_optimizer(other))
    accumulate(plain, [(x, y)], 7)
    assert engine.step(0.1) == pytest.approx(plain.step(0.1), rel=1e-2) and not engine.skipped, "fp16 keeps eleven bits; a sum of seven"
    assert engine.scale["since"] == 1 and plain.scale is None


def test_a_step_that_fp16_skipped_is_no_update_after_a_resume(tmp_path):
    """Two overflows and one update: AdamW's bias correction counts one. The next step of both engines is equal to the last bit."""
    from qlora_kit.run.checkpoint import newest_checkpoint
    from qlora_kit.run.run_folder import restore, save
    from qlora_kit.training.loop import Progress

    def make_half():
        torch.manual_seed(0)
        return LocalEngine(module := Half(), make_optimizer(module), fp16=True)
    (x, y), engine, again = data(), make_half(), make_half()
    for scale in (2.0**24, 2.0**24, 2.0**6):
        engine.scale = {"scale": scale, "since": 0}
        accumulate(engine, [(x, y)], 7)
        engine.step(0.1)
    assert engine.scale["updates"] == 1
    save(tmp_path, engine, Progress(step=3), size=1, keep=2)
    restore(again, newest_checkpoint(tmp_path))
    for each in (engine, again):
        accumulate(each, [(x, y)], 7)
        each.step(0.1)
    assert all(torch.equal(engine.state()[k], again.state()[k]) for k in engine.state()) and again.scale == engine.scale
    other = make_half()
    other.load(engine.state(), 4)  # as if every step had been an update
    assert again.optimizer.state[again.trained[0]]["step"] == 2 != other.optimizer.state[other.trained[0]]["step"]


def test_a_gradient_that_is_no_number_is_not_an_overflow():
    module = Net()
    engine = LocalEngine(module, make_optimizer(module))
    before = engine.gather()
    accumulate(engine, [(torch.full((7, 3), float("nan")), torch.zeros(7, 1))], 7)
    assert not torch.isfinite(torch.tensor(engine.step(0.1))) and not engine.skipped
    assert all(torch.equal(v, before[k]) for k, v in engine.gather().items())


def start(script, *words, ranks=2):
    """Run `script` once per rank; what rank 0 printed last, parsed."""
    env = os.environ | dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
                            PYTHONPATH=os.path.dirname(__file__))
    started = [subprocess.Popen([sys.executable, "-c", script, *map(str, words)], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool: said = list(pool.map(lambda p: wait(p, started), started))
    assert [p.returncode for p in started] == [0]*ranks, [err[-3000:] for _, err in said]
    return json.loads(said[0][0].splitlines()[-1])


def wait(process, others):
    """When a rank fails the others would wait for it, so they end too."""
    try: said = process.communicate(timeout=600)
    finally:
        if process.returncode != 0:
            for other in others: other.kill()
    return said


HANDOVER = """
import json, sys
from safetensors.torch import load_file, save_file
from qlora_kit.training.engine import DeepSpeedEngine, join_ranks, leave, make_optimizer
from qlora_kit.training.zero import zero_config
from deepspeed.accelerator import get_accelerator
from test_engine import Net, Net16
tensors, place, norms = load_file(sys.argv[1]), join_ranks(several=True), []
rows = ([0, 1], [2, 3]) if place.rank == 0 else ([4, 5], [6])
for stage in range(4):
    net = Net()
    engine = DeepSpeedEngine(net, make_optimizer(net, 0.1), zero_config(stage, accumulation=2, hidden_size=1), place)
    taken = {k: v for k, v in tensors.items() if "/" in k}
    engine.load(taken, step=3)
    state = engine.state()
    assert state.keys() == taken.keys() and all((state[k] == taken[k]).all() for k in taken), f"stage {stage}: not the state that was loaded"
    for step in range(2):
        for i, part in enumerate(rows): engine.backward(engine.forward({k: tensors[k][part] for k in "xy"}), n=7, last=i == 1)
        norms.append(engine.step(0.1))
    assert engine.total(place.rank + 1) == 3
    state = engine.state()
    if place.rank == 0: save_file(state, f"{sys.argv[1]}.{stage}")
    for i, part in enumerate(rows): engine.backward(engine.forward({k: tensors[k][part]*float("nan" if place.rank else 1) for k in "xy"}), n=7, last=i == 1)
    norm = engine.step(0.1)
    assert not abs(norm) < float("inf") and not engine.skipped, f"stage {stage}: {norm}"
    after = engine.state()
    assert all((after[k] == state[k]).all() for k in state), f"stage {stage}: a gradient that is no number reached the weights"
    engine.ds.destroy()
get_accelerator().is_fp16_supported = lambda: True # these CPU kernels exist, DeepSpeed asks for instructions that make them fast
for stage in range(4):
    net = Net16()
    engine = DeepSpeedEngine(net, make_optimizer(net), zero_config(stage, accumulation=2, dtype="float16", hidden_size=1), place)
    engine.scale = {"scale": 2.0**24, "since": 5}
    for scale in (2.0**24, 2.0**9):
        before = engine.state()
        for i, part in enumerate(rows): engine.backward(engine.forward({k: tensors[k][part] for k in "xy"}), n=7, last=i == 1)
        norm = engine.step(0.1)
        if engine.skipped: assert all((v == before[k]).all() for k, v in engine.state().items()) and engine.scale == {"scale": scale/2, "since": 0, "updates": 0}, stage
        if scale > 2**9: assert engine.skipped; engine.scale = {"scale": 2.0**9, "since": 0}
    assert not engine.skipped and engine.scale == {"scale": 2.0**9, "since": 1, "updates": 1}, (stage, engine.scale)
    norms.append(norm)
    engine.ds.destroy()
if place.rank == 0: print(json.dumps(norms))
leave()
"""


class Net16(Net):
    """Computes in the dtype that the engine gave its weights."""
    def forward(self, x, y): return ((self.model(x.to(self.model[2].weight.dtype)).float() - y)**2).sum()


@pytest.mark.ranks
def test_two_ranks_take_over_from_one_process_and_go_on_at_every_stage(tmp_path):
    """Accumulation, seven rows over two ranks, sizes 5 and 1; fp32 sums in another order, enlarged by two steps of Adam."""
    x, y = data()
    engine = make(weight_decay=0.1)
    for _ in range(3): accumulate(engine, [(x, y)], 7); engine.step(0.1)
    file = tmp_path / "state.safetensors"
    save_file({**engine.state(), "x": x, "y": y}, file)
    norms = []
    for _ in range(2): accumulate(engine, [(x, y)], 7); norms.append(engine.step(0.1))
    fresh = make()
    accumulate(fresh, [(x, y)], 7)
    said = start(HANDOVER, file)
    assert said[:8] == pytest.approx(norms*4, rel=1e-4)
    assert said[8:] == pytest.approx([fresh.step(0.1)]*4, rel=1e-2), "fp16 keeps eleven bits, and the scale cancels out"
    ours = engine.state()
    for stage in range(4):
        theirs = load_file(f"{file}.{stage}")
        assert theirs.keys() == ours.keys()
        for k in ours: torch.testing.assert_close(theirs[k], ours[k], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A function: layers, width, vocabulary → the folder of a random Llama with an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(layers=2, hidden=64, vocab=320):
        folder = tmp_path_factory.mktemp("llama")
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=3*hidden, num_hidden_layers=layers, num_attention_heads=4,
                                     num_key_value_heads=2, tie_word_embeddings=False)).save_pretrained(folder)
        return folder
    return write


def small_llama(folder, dtype=torch.float32, recompute=True, rank=5, storage="uint8"):
    """The model in NF4, with an adapter that does something, behind the loss of page 06."""
    from qlora_kit.model.loader import load_model
    from qlora_kit.model.lora import add_lora, recompute_layers
    from qlora_kit.training.loss import LossModel

    model = load_model(folder, dtype=dtype, quant_storage=storage)
    if recompute: recompute_layers(model)
    model = add_lora(model, r=rank, alpha=8, seed=1)
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name: p.data.copy_(torch.randn(p.shape, generator=g)*0.05)
    return LossModel(model).train()


def train_small(engine, ranks, steps, allow_skip=False):
    """Losses of `steps` steps over the rows of `ranks`, which have very unequal target counts."""
    losses = []
    for step in range(steps):
        parts, n = [], 0
        for rank in range(2):
            for micro in range(2):
                ids = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(100*(step % 2) + 10*micro + rank))
                labels = ids.clone(); labels[:, :2 + 8*rank] = -100
                n += int((labels[:, 1:] != -100).sum())
                if rank in ranks: parts.append(dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
        loss = 0.0
        for i, batch in enumerate(parts):
            out = engine.forward(batch)
            engine.backward(out, n, last=i == len(parts)-1)
            loss += out.item()
        norm = engine.step(1e-2)
        losses.append(engine.total(loss)/n)
        assert abs(norm) < float("inf") or allow_skip and engine.skipped
    return losses


STAGES = """
import json, sys
from qlora_kit.training.engine import DeepSpeedEngine, join_ranks, leave, make_optimizer
from qlora_kit.training.zero import zero_config
from test_engine import small_llama, train_small
place, said = join_ranks(several=True), {}
for name, choice in json.loads(sys.argv[2]).items():
    module = small_llama(sys.argv[1])
    engine = DeepSpeedEngine(module, make_optimizer(module), zero_config(accumulation=2, hidden_size=64, **choice), place)
    said[name] = train_small(engine, [place.rank], 20)
    state = engine.state()
    engine.load({k: v+1 for k, v in state.items()}, step=20)
    engine.load(state, step=20)
    again = engine.state()
    assert all((again[k] == state[k]).all() for k in state), name
    engine.ds.destroy()
if place.rank == 0: print(json.dumps(said))
leave()
"""


@pytest.mark.ranks
def test_every_stage_and_cpu_offload_train_as_one_process_does(llama_folder):
    """20 steps, 2 micro-batches, 40 targets of rank 0 against 4 of rank 1, layers recomputed. fp32: the order of a sum costs a few roundings of 6e-8, which
    Adam enlarges; offload has been seen to differ by 2e-5."""
    choices = {f"stage {s}": dict(stage=s) for s in range(4)}
    choices |= {"optimizer on the CPU, stage 2": dict(stage=2, offload_optimizer="cpu"), "both on the CPU, stage 3": dict(offload_param="cpu", offload_optimizer="cpu")}
    folder = llama_folder()
    module = small_llama(folder)
    alone = train_small(LocalEngine(module, make_optimizer(module)), [0, 1], 20)
    for name, losses in start(STAGES, folder, json.dumps(choices)).items():
        assert losses == pytest.approx(alone, rel=2e-5 if "CPU" in name else 1e-5), name
    assert alone[-1] < alone[0] - 0.5, "the same two batches, again and again"


LEVELS = ("dense", "none", "pointwise", "mlp", "layer", "mlp_host", "host")


def at_level(folder, level="none", sharded=False, variant="lora", adapter=None, **load):
    """`small_llama` as a run makes it: fast forms, a level for its layers; each rank its share of it if `sharded`."""
    from qlora_kit.model.flat import on_demand
    from qlora_kit.model.sharded import load_sharded
    from qlora_kit.training.recompute import set_levels
    from qlora_kit.model.linear import fast_linears
    from qlora_kit.model.loader import load_model
    from qlora_kit.model.lora import add_lora, load_adapter
    from qlora_kit.training.loss import LossModel
    from qlora_kit.model.kernels import fast_pointwise

    base = load_sharded(folder, **load) if sharded else load_model(folder, **load)
    with on_demand(base): model = load_adapter(base, adapter, trainable=True) if adapter else add_lora(base, r=2, alpha=8, seed=1, variant=variant)
    fast_linears(model); fast_pointwise(model); set_levels(model, level)
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name: p.data.copy_(torch.randn(p.shape, generator=g)*0.2)
    return LossModel(model).train()


def answer(module):
    """What the model says, greedily."""
    module.eval()
    with torch.no_grad(): ids = module.model.generate(input_ids=torch.arange(5, 12)[None], max_new_tokens=6, do_sample=False, pad_token_id=0)
    module.train()
    return ids[0].tolist()


FAMILIES = """
import json, sys
import torch
from qlora_kit.training.engine import DeepSpeedEngine, join_ranks, leave, make_optimizer
from qlora_kit.training.zero import zero_config
from test_engine import at_level, three_rows
place, said = join_ranks(several=True), {}
for name, folder, level, load in json.loads(sys.argv[1]):
    module = at_level(folder, level, **load)
    engine = DeepSpeedEngine(module, make_optimizer(module), zero_config(hidden_size=60), place)
    said[name] = three_rows(engine, [place.rank])
    engine.ds.destroy()
if place.rank == 0: print(json.dumps(said))
leave()
"""


def three_rows(engine, rows):
    """Losses of four steps; three rows of a step, shared by ranks."""
    losses = []
    for step in range(4):
        loss = 0.0
        for i, row in enumerate(rows):
            ids = torch.randint(3, 300, (1, 14), generator=torch.Generator().manual_seed(10*(step % 2) + row))
            out = engine.forward(dict(input_ids=ids, labels=ids))
            engine.backward(out, 39, last=i == len(rows)-1)
            loss += out.item()
        engine.step(1e-2)
        losses.append(engine.total(loss)/39)
    return losses


@pytest.mark.ranks
def test_families_train_on_three_ranks_as_in_one_process(tmp_path):
    """Shards that do not divide, a tied head, Conv1D with biases, a base in 32 bits; with and without recomputation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    llama = dict(vocab_size=301, hidden_size=60, intermediate_size=75, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    shapes = {"llama": llama, "gpt2": dict(vocab_size=301, n_embd=52, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "qwen2": llama}
    cases = []
    for name, shape in shapes.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape, tie_word_embeddings=name != "qwen2")).save_pretrained(tmp_path / name)
        cases += [[f"{name} {level}", str(tmp_path / name), level, {}] for level in ("none", "layer")]
    cases.append(["plain", str(tmp_path / "llama"), "none", dict(quant_type="none")])
    said = start(FAMILIES, json.dumps(cases), ranks=3)
    for name, folder, level, load in cases:
        module = at_level(folder, level, **load)
        assert said[name] == pytest.approx(three_rows(LocalEngine(module, make_optimizer(module)), range(3)), rel=1e-5), name


NVME = """
import json, os, sys
from pathlib import Path
import torch
from qlora_kit.training.engine import DeepSpeedEngine, join_ranks, leave, make_optimizer
from qlora_kit.training.zero import zero_config
from test_engine import small_llama, train_small
place, said = join_ranks(several=True), {}
def open_files(folder):
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try: found += [os.fstat(int(fd)).st_size]*(folder in os.readlink(f"/proc/self/fd/{fd}"))
        except OSError: pass # the folder's own, closed by now
    return found
for where, offload in dict(none={}, params=dict(offload_param="nvme"), both=dict(offload_param="nvme", offload_optimizer="nvme")).items():
    module = small_llama(sys.argv[1], dtype=torch.bfloat16, rank=32)
    config = zero_config(accumulation=2, dtype="bfloat16", hidden_size=256, nvme_path=f"{sys.argv[2]}/{where}", **offload)
    engine = DeepSpeedEngine(module, make_optimizer(module), config, place)
    said[where] = train_small(engine, [place.rank], 2)
    state = engine.state()
    engine.load(state, step=2)
    again = engine.state()
    assert all((again[k] == state[k]).all() for k in state)
    said[where + " files"] = sorted(open_files(f"{sys.argv[2]}/{where}"))
    assert not list(Path(sys.argv[2]).rglob("*.*")), "a file that a kill would leave behind"
    said[where + " shares"] = sorted(row.part for row in {m.flat for m in module.modules() if hasattr(m, "flat")})
    engine.ds.destroy()
if place.rank == 0: print(json.dumps(said))
leave()
"""


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_waits_on_nvme_is_in_files_and_trains_the_same(llama_folder, tmp_path):
    """Each layer's, the embedding's and the head's share are in a file without a name. The same numbers are computed, so the losses are equal."""
    said = start(NVME, llama_folder(layers=3, hidden=256), tmp_path / "nvme")
    assert said["none"] == said["params"] == said["both"] and said["none files"] == []
    assert said["params files"] == said["both files"] == said["params shares"] and len(said["params shares"]) == 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_hundred_steps_in_fp16_on_a_card_find_their_scale_and_learn(llama_folder):
    """An adapter in fp32 on a base in fp16. Both runs learn the same two batches by heart; fp16's eleven bits and skipped steps change the way there, not the end."""
    ends = {}
    for dtype in (torch.float32, torch.float16):
        module = small_llama(llama_folder(), dtype=dtype).cuda()
        assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
        engine = LocalEngine(module, make_optimizer(module), device="cuda:0", fp16=dtype == torch.float16)
        engine.scale = {"scale": 2.0**30, "since": 0}
        skipped, losses = 0, []
        for step in range(200):
            losses += train_small(engine, [0, 1], 1, allow_skip=True)
            skipped += engine.skipped
        ends[dtype] = losses[-1]
        assert losses[-1] < losses[0] - 1
        if engine.fp16: assert 1 <= skipped <= 30 and 1 <= engine.scale["scale"] < 2.0**30 and all(torch.isfinite(t).all() for t in engine.state().values())
        else: assert skipped == 0 and engine.scale is None
    assert ends[torch.float16] == pytest.approx(ends[torch.float32], abs=0.02)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("level", ["dense", "none", "pointwise", "mlp", "layer", "mlp_host", "host"])
def test_a_step_waits_for_nothing(level, llama_folder):
    """The processor runs ahead of the card: after the first step, a wait anywhere is an error, in padded and in packed batches."""
    from qlora_kit.data.batches import attend_documents, pack, pad
    from qlora_kit.training.engine import Numbers
    from qlora_kit.training.recompute import set_levels
    from qlora_kit.model.linear import fast_linears
    from qlora_kit.model.loader import load_model
    from qlora_kit.model.lora import add_lora
    from qlora_kit.training.loss import LossModel
    from qlora_kit.model.kernels import fast_pointwise
    from qlora_kit.data.tokens import Example

    model = add_lora(load_model(llama_folder(), dtype=torch.bfloat16, device="cuda:0", quiet=True), 4, 8, dropout=0.05, seed=0)
    fast_linears(model)
    fast_pointwise(model)
    set_levels(model, level)
    assert attend_documents(model)
    module = LossModel(model, neftune_alpha=1.0).train()
    engine = LocalEngine(module, make_optimizer(module), device="cuda:0")
    rows = [Example([5 + i] * n, [False] + [True] * (n - 1)) for i, n in enumerate((30, 17, 25, 9))]
    numbers = []

    def step():
        for batch in (pad(rows, 0), pack([rows[:2], rows[2:]], 0)):
            loss = engine.forward(batch)
            engine.backward(loss, 77)
        numbers.append(Numbers(loss.detach(), engine.step(1e-2)))

    step(); step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(); step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses = [n.read()[0] for n in numbers]
    assert losses[-1] < losses[0]
