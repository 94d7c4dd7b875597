"""Optimizers: groups and rates against PEFT's, 8-bit moments against bitsandbytes' own, and a state that comes back to the last bit."""
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from qlora_kit.run.config import RunConfig
from qlora_kit.data.files import UserError
from qlora_kit.training.engine import LocalEngine, make_optimizer, optimizer_class, set_lr
from qlora_kit.run.assemble import check_choices

PAGED = ["paged_adamw_8bit", "paged_adamw_32bit"]


class Net(torch.nn.Module):
    """A matrix large enough for 8-bit moments (4,096 numbers), and small ones that stay in fp32."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 3))
    def forward(self, x): return self.model(x).square().sum()


def make(kind, device="cpu", weight_decay=0.1):
    module = Net().to(device)
    return LocalEngine(module, make_optimizer(module, weight_decay, kind), device=device)


def walk(engine, steps):
    for step in range(steps):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
        engine.backward(engine.forward(dict(x=x)), n=5)
        engine.step(1e-2)
    return engine.state()


def returns_exactly(kind, device):
    whole = walk(make(kind, device), 3)
    first = make(kind, device)
    saved = walk(first, 3)
    before = {k: v.clone() for k, v in saved.items()}
    resumed = make(kind, device)
    resumed.load(saved, step=3)
    a, b = walk(first, 3), walk(resumed, 3)
    assert a.keys() == b.keys() == whole.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(saved[k], before[k]) for k in saved) and not torch.equal(a["param/0.weight"], saved["param/0.weight"])
    resumed.load(saved, step=3) # once more, over moments that are there already
    assert all(torch.equal(v, a[k]) for k, v in walk(resumed, 3).items())
    return saved


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_state_comes_back_to_the_last_bit(kind):
    saved = returns_exactly(kind, "cpu")
    assert saved["exp_avg/0.weight"].dtype == (torch.uint8 if kind == "adamw_8bit" else torch.float32)
    assert saved["exp_avg/0.bias"].dtype == torch.float32 and ("exp_avg_absmax/0.weight" in saved) == (kind == "adamw_8bit")


def test_a_state_before_the_first_step_is_a_fresh_start():
    fresh, loaded = make("adamw_8bit"), make("adamw_8bit")
    loaded.load(fresh.state(), step=0)
    a, b = walk(fresh, 2), walk(loaded, 2)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_8bit_steps_are_bitsandbytes_own():
    engine, module = make("adamw_8bit", weight_decay=0.0), Net()
    walk(engine, 4)
    theirs = AdamW8bit(module.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(4):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
        (module(x)/5).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        theirs.step(); theirs.zero_grad()
    assert all(torch.equal(p, engine.gather()[n.removeprefix("model.")]) for n, p in module.named_parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_loraplus_groups_are_pefts(dora):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0", "1"], use_dora=dora))
    ours, theirs = make_optimizer(module, loraplus_ratio=8.0), create_loraplus_optimizer(module.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    set_lr(ours, 1e-3)
    rates = lambda o: {p: g["lr"] for g in o.param_groups for p in g["params"]}
    assert rates(ours) == rates(theirs) and set(rates(ours).values()) == {1e-3, 8e-3}
    plain = make_optimizer(module)
    set_lr(plain, 1e-3)
    assert set(rates(plain).values()) == {1e-3}


def test_what_a_device_has_not_is_refused():
    for kind in PAGED:
        with pytest.raises(UserError, match="use adamw or adamw_8bit"): optimizer_class(kind, "cpu")
    with pytest.raises(UserError, match="allowed are adamw, adamw_8bit"): optimizer_class("sgd")


def test_choices_are_refused_before_anything_is_loaded():
    config = lambda **changes: RunConfig.model_validate(dict(data=dict(train_file="rows.json"), **changes))
    with pytest.raises(UserError, match="on the CPU"): check_choices(config(training=dict(optimizer="paged_adamw_32bit")))
    with pytest.raises(UserError, match="residual_base"): check_choices(config(model=dict(lora_init="pissa")))
    with pytest.raises(UserError, match="under DeepSpeed only adamw"): check_choices(config(training=dict(optimizer="adamw_8bit")), several=True)
    check_choices(config(model=dict(lora_variant="rslora+dora")), several=True)
    check_choices(config(model=dict(lora_variant="dora"), training=dict(optimizer="adamw_8bit", loraplus_ratio=4)))


def test_a_run_with_everything_resumes_to_the_last_bit(tiny_config):
    """8-bit moments, LoRA+, DoRA and a layer with its own rank: cut after step 3 and gone on."""
    import shutil
    from safetensors.torch import load_file
    from qlora_kit.run.checkpoint import checkpoints, load_checkpoint
    from qlora_kit.run.config import load_config
    from qlora_kit.run.train import train
    path = tiny_config("all", model__lora_variant="rslora+dora", model__rank_pattern={"down_proj": 32}, training__optimizer="adamw_8bit", training__loraplus_ratio=4,
                       training__max_steps=5, training__learning_rate=1e-3)
    full = train(load_config(path), path.stem, quiet=True, base=path.parent)
    cut = path.parent/"runs/cut"
    shutil.copytree(full.run, cut)
    for checkpoint in checkpoints(cut):
        if load_checkpoint(checkpoint).step > 3: shutil.rmtree(checkpoint)
    assert any(t.dtype == torch.uint8 for t in load_checkpoint(checkpoints(cut)[0]).tensors.values())
    resumed = train(load_config(path, [f"training.output_dir={cut}"]), path.stem, quiet=True, base=path.parent, resume=cut)
    a, b = (load_file(r.run/"adapter/adapter_model.safetensors") for r in (full, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and any("magnitude" in k for k in a)


cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=cuda) for k in ["adamw_8bit", *PAGED]])
def test_a_state_on_a_card_comes_back_to_the_last_bit(kind):
    saved = returns_exactly(kind, "cuda")
    assert all(t.device.type == "cpu" for t in saved.values())
    assert saved["exp_avg/0.weight"].dtype == (torch.uint8 if "8bit" in kind else torch.float32)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=cuda) for k in PAGED])
def test_paged_large_moments_are_paged_and_come_back(kind):
    """Only tensors of 100,000 numbers or more are paged."""
    def large():
        module = torch.nn.Module()
        torch.manual_seed(0)
        module.model = torch.nn.Linear(512, 512, bias=False).cuda()
        module.forward = lambda x: module.model(x).square().sum()
        return LocalEngine(module, make_optimizer(module, kind=kind), device="cuda")
    def go(engine, steps):
        for _ in range(steps): engine.backward(engine.forward(dict(x=torch.eye(512))), n=512); engine.step(1e-3)
        return engine.state()
    first, second = large(), large()
    second.load(go(first, 3), step=3)
    assert all(getattr(s["state1"], "is_paged", False) for e in (first, second) for s in e.optimizer.state.values())
    a, b = go(first, 2), go(second, 2)
    assert all(torch.equal(a[k], b[k]) for k in a)
