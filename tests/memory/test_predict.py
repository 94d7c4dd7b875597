"""Bytes before they are allocated: against loaded models, against PEFT's count, and against what two real steps take."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qlora_kit.data.files import GB, UserError
from qlora_kit.training.recompute import HOST_DESCENT, mixed_levels, DESCENT
from qlora_kit.memory.predict import (
    anatomy, divided, gathered, kept_in_all, layer_row, levels_of, predict, resident, Setup,
    shape_text, stand_in, trace, trace_level)
from qlora_kit.memory.budget import (
    changes, fill_card, fit_card, parse_size, smallest_change, traffic)
from dataclasses import replace

ROOT = Path(__file__).parents[2]
SMALL = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "phi3": {**SMALL, "pad_token_id": 0},
    "gemma2": SMALL,
    "gemma3_text": SMALL,
    "olmo2": SMALL,
    "gpt2": dict(vocab_size=320, n_embd=64, n_layer=5, n_head=4),
    "gpt_neox": SMALL,
}


@pytest.fixture
def shape(tmp_path):
    """Returns a function that writes a config.json and gives its folder."""

    def write(model_type, **settings):
        folder = tmp_path / model_type
        AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
        return str(folder)

    return write


def contents(model):
    """Bytes of packed weights, of their scales, and of everything else."""
    from bitsandbytes.nn import Params4bit

    packed, scales, rest = 0, 0, 0
    for p in model.parameters():
        if not isinstance(p, Params4bit):
            rest += p.nbytes
            continue
        packed += p.nbytes
        scales += p.quant_state.absmax.nbytes
        if p.quant_state.nested:
            scales += p.quant_state.state2.absmax.nbytes + p.quant_state.offset.nbytes
    return packed, scales, rest


@pytest.mark.parametrize("double_quant", [True, False])
def test_counts_are_those_of_a_loaded_model(tiny_llama, double_quant):
    from qlora_kit.model.loader import load_model
    from qlora_kit.model.lora import add_lora

    loaded = load_model(tiny_llama, double_quant=double_quant)
    a = anatomy(Setup(str(tiny_llama), dtype="float32", double_quant=double_quant, r=4))
    assert (sum(a.packed), a.scales, sum(a.wide) + sum(a.other)) == contents(loaded)
    assert sum(a.adapter) == add_lora(loaded, r=4).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("settings", [dict(target_modules=("q_proj", "down_proj")), dict(rank_pattern=(("down_proj", 8),)), dict(variant="dora")])
def test_the_adapter_is_counted_as_peft_counts_it(tiny_llama, settings):
    from qlora_kit.model.loader import load_model
    from qlora_kit.model.lora import add_lora

    s = Setup(str(tiny_llama), dtype="float32", r=4, **settings)
    targets = s.target_modules if isinstance(s.target_modules, str) else list(s.target_modules)
    model = add_lora(load_model(tiny_llama), 4, 8, dropout=0.0, target_modules=targets, seed=0, variant=s.variant, rank_pattern=dict(s.rank_pattern))
    assert sum(anatomy(s).adapter) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_predicted(shape, family):
    folder = shape(family, **FAMILIES[family])
    for device in ("cuda", "cpu"):
        s = Setup(folder, batch=2, length=64, device=device)
        kept, again = trace(replace(s, recompute="none")), trace(s)
        assert kept.kept > again.kept > 0 and kept.loss == again.loss > 0
        assert sum(again.layer.values()) >= 2 * 64 * 64 * 2  # the layer's input in bf16
        assert predict(replace(s, batch=4)).peak > predict(s).peak > sum(anatomy(s).packed)


@pytest.mark.parametrize("level", ["dense", "none", "pointwise", "mlp", "layer"])
def test_kept_activations_are_those_that_autograd_keeps(shape, level):
    """The reference runs for real, on a CPU in fp32, and asks autograd through its own hooks."""
    from qlora_kit.training.recompute import set_levels
    from qlora_kit.model.linear import fast_linears
    from qlora_kit.model.lora import add_lora
    from qlora_kit.training.loss import split_model
    from qlora_kit.model.kernels import fast_pointwise

    folder = shape("llama", **SMALL)
    s = Setup(folder, batch=2, length=64, r=4, dtype="float32", device="cpu", recompute=level)
    model = add_lora(stand_in(shape_text(folder), dtype=torch.float32, device="cpu"), r=4, seed=0).train()
    fast_linears(model)
    fast_pointwise(model)
    set_levels(model, level)
    known = {x.untyped_storage().data_ptr() for m in model.modules() for x in [*m._parameters.values(), *m._buffers.values()] if x is not None}
    kept, alive = {}, []

    def keep(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        split_model(model)[0](input_ids=torch.zeros(2, 64, dtype=torch.int64), use_cache=False)
    expected = sum(kept.values())
    assert trace_level(s, level).kept == pytest.approx(expected, rel=0.03, abs=2.3 * 2 * 64 * 64 * 4)  # beside what is saved live the ids, the embedded tokens (in a recipe) and the output


EIGHT, X = Setup("llama-3.1-8b", batch=4), 4 * 2048 * 4096 * 2  # and its hidden states, 64 MiB


def test_what_waits_in_host_memory_is_known_by_name():
    """A layer on `mlp_host`: both norms' inputs, q and attention's result are as wide as the hidden states, k and v a quarter. On `host`: its input."""
    for level, each in (("mlp_host", 4.5), ("host", 1)):
        assert predict(replace(EIGHT, recompute=level)).elsewhere == {"activations": 32 * each * X}
    for away in ("none", "cpu", "nvme"): assert trace_level(replace(EIGHT, stage=3, ranks=2, offload_param=away), "mlp") == trace_level(EIGHT, "mlp")
    mixed = replace(EIGHT, recompute=("mlp_host",) * 31 + ("mlp",))
    assert kept_in_all(mixed) == pytest.approx(kept_in_all(replace(EIGHT, recompute="mlp_host")) + 4.5 * X + 6 * X, rel=0.01)  # the last ones sent are still there


@pytest.mark.parametrize("size", [48, 24, 12, 9])
def test_a_card_is_filled_and_not_overfilled(size):
    """One single step up would be too much; and who has no memory for five tensors a layer steps down the other way."""
    for host, walk in ((None, HOST_DESCENT), (2 * GB, DESCENT)):
        chosen = fill_card(EIGHT, size * GB, host=host)
        steps = sum(map(walk.index, chosen.recompute))
        assert chosen.recompute == mixed_levels(32, steps, walk) and fit_card(chosen, size * GB).fits
        assert not fit_card(replace(EIGHT, recompute=mixed_levels(32, steps - 1, walk)), size * GB).fits
        assert host is None or "mlp_host" not in chosen.recompute
    assert fill_card(EIGHT, size * GB, host=0) == fill_card(EIGHT, size * GB, host=2 * GB)


def test_predicting_leaves_no_trace(tiny_llama):
    """No random number is drawn, and bitsandbytes' codebook, kept for the next real load, holds numbers."""
    from bitsandbytes.functional import name2qmap

    from qlora_kit.model.loader import load_model, packed_hash

    name2qmap.clear()
    before = torch.get_rng_state()
    predict(Setup(str(tiny_llama), batch=3, length=40, r=2, dropout=0.1, fast=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not name2qmap["dynamic"].is_meta
    assert packed_hash(load_model(tiny_llama))


def test_shards_add_up_and_small_tensors_stay_whole():
    s = Setup("llama-3.1-8b", ranks=3, stage=3)
    whole, shards = resident(replace(s, ranks=1))[0], resident(s)[0]
    assert shards["packed weights"] == pytest.approx(whole["packed weights"] / 3, rel=1e-6)
    assert shards["scales"] == pytest.approx(whole["scales"] / 3, rel=1e-6)
    assert shards["norms and other plain weights"] == whole["norms and other plain weights"]  # 4096 numbers each, under 10 D
    assert 3 * shards["embedding and head"] >= whole["embedding and head"]
    assert predict(replace(s, ranks=8)).peak < predict(s).peak < predict(replace(s, ranks=1, stage=0)).peak


def test_a_rank_holds_its_share_two_layers_and_the_adapter():
    for shape, W in (("llama-3.1-8b", 2), ("llama-3.1-70b", 8)):
        s, a = Setup(shape, ranks=W, stage=3), anatomy(Setup(shape))
        layer = (sum(a.packed) + a.scales)//a.layers
        assert layer_row(s) == layer and gathered(s) == (2*layer, max(a.wide))
        assert gathered(replace(s, buffers=9))[0] == 9*layer and gathered(replace(s, buffers=999))[0] == a.layers*layer == gathered(replace(s, buffers=a.layers))[0]
        here, whole = resident(s)[0], resident(replace(s, stage=1))[0]
        for name in ("packed weights", "scales", "embedding and head"): assert here[name] == pytest.approx(whole[name]/W, rel=1e-6)
        for name in ("norms and other plain weights", "adapter", "gradients", "optimizer"): assert here[name] == whole[name]
    for s in (Setup(stage=3), Setup(stage=2, ranks=2)): assert not divided(s) and gathered(s) == (0, 0)


def test_offload_moves_bytes_off_the_card():
    s = Setup("llama-3.1-8b", ranks=2, stage=3)
    kept = resident(s)[0]
    for where in ("cpu", "nvme"):
        here, there = resident(replace(s, offload_param=where, offload_optimizer="cpu"))
        assert all(here[k] + there.get(k, 0) == kept[k] and bool(here[k]) != (k in there) for k in kept)
        assert {*there} == {"packed weights", "scales", "embedding and head", "gradients", "optimizer"}


def test_nf4_moves_a_quarter_of_bf16():
    s = Setup("llama-3.1-70b", ranks=8, stage=3, accumulation=3, recompute="none")
    nf4, bf16 = traffic(s), traffic(replace(s, quant_type="none"))
    assert bf16["layers"] == pytest.approx(16/4.127 * nf4["layers"], rel=0.01)  # bits of a weight
    assert nf4["layers"] == 3 * traffic(replace(s, accumulation=1))["layers"]
    L, row = anatomy(s).layers, layer_row(s)
    assert nf4["layers"] == pytest.approx(3 * 2 * 7 / 8 * (L - 2) * row, rel=1e-6)
    assert traffic(replace(s, buffers=L))["layers"] == 0 and traffic(replace(s, buffers=L - 1))["layers"] == pytest.approx(3 * 2 * 7 / 8 * row, rel=1e-6)
    assert traffic(replace(s, recompute="layer")) == nf4 and {k: nf4[k] for k in ("gradients", "updated adapter")} == traffic(replace(s, stage=1))
    assert sum(traffic(replace(s, stage=0)).values()) < nf4["layers"] / 50


RANK = """
import json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from qlora_kit.training.engine import DeepSpeedEngine, join_ranks, leave, make_optimizer
from qlora_kit.training.recompute import set_levels
from qlora_kit.model.linear import fast_linears
from qlora_kit.model.loader import load_model
from qlora_kit.model.lora import add_lora
from qlora_kit.training.loss import LossModel
from qlora_kit.model.kernels import fast_pointwise
from qlora_kit.training.zero import zero_config

class Received(TorchDispatchMode):
    "Bytes that gathers bring to this rank."
    bytes = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "gather" in str(function):
            whole, own = (sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args[:2])
            self.bytes += abs(whole - own)
        return function(*args, **(kwargs or {}))

place, ids, said = join_ranks(several=True), torch.randint(60, (2, 16)), []
for folder, level, buffers in json.loads(sys.argv[1]):
    model = add_lora(load_model(folder), r=4).train()
    fast_linears(model); fast_pointwise(model); set_levels(model, level)
    module = LossModel(model)
    engine = DeepSpeedEngine(module, make_optimizer(module), zero_config(hidden_size=64), place, buffers)
    for step in range(2): # the first fills the buffers
        with Received() as received: engine.backward(engine.forward(dict(input_ids=ids, labels=ids)), n=60)
        engine.step(1e-3)
    said.append(received.bytes)
if place.rank == 0: print(json.dumps(said))
leave()
"""


@pytest.mark.ranks
def test_a_layer_s_gathers_are_counted(tmp_path):
    """All that gathers bring two ranks in a step, on several levels and with several buffers; segments are padded to 256 bytes."""
    from transformers import AutoModelForCausalLM

    from qlora_kit.training.engine import free_port

    choices, folders = (("none", 2), ("mlp", 3), ("layer", 6)), {L: str(tmp_path / f"{L}") for L in (6, 9)}
    for L, folder in folders.items():
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | dict(num_hidden_layers=L, intermediate_size=224))).save_pretrained(folder)
    cases = [(folder, level, buffers) for folder in folders.values() for level, buffers in choices]
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, json.dumps(cases)], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=open(tmp_path / f"out{r}", "w"),
                              stderr=open(tmp_path / f"err{r}", "w")) for r in (0, 1)]
    codes = [p.wait(timeout=300) for p in ranks]
    assert codes == [0, 0], [(tmp_path / f"err{r}").read_text()[-3000:] for r in (0, 1)]
    received = json.loads((tmp_path / "out0").read_text().splitlines()[-1])
    bills = [traffic(Setup(folder, ranks=2, stage=3, dtype="float32", recompute=level, r=4, buffers=buffers)) for folder, level, buffers in cases]
    for case, found, bill in zip(cases, received, bills):
        padding = found - bill["layers"] - bill["embedding and head"]
        gathers = 2 * (int(case[0].rpartition("/")[2]) - case[2])  # of 21 segments, each up to 255 bytes longer, half of it from the other rank
        assert 0 <= padding <= (gathers * 21 + 2) * 256 / 2, case


def test_published_measurements_are_near():
    """One H100, other code around the same NF4 weights: 70B took 37.6 GB of weights with its adapter, 43.2 GB at 1 × 2048, 53 at 4 × 2048."""
    s = Setup("llama-3.1-70b")
    here = resident(s)[0]
    weights = sum(here[k] for k in here if k not in ("gradients", "optimizer"))
    assert weights / GB == pytest.approx(37.6, rel=0.005)
    assert predict(s).peak / GB == pytest.approx(43.2, rel=0.05)
    assert predict(replace(s, batch=4)).peak / GB == pytest.approx(53, rel=0.1)


def test_the_smallest_change_fits_and_nothing_cheaper_does():
    s = Setup("llama-3.1-8b", batch=4, recompute="none")
    change, fit = smallest_change(s, 24 * GB)
    assert change == dict(recompute="mlp") and fit.fits and not fit_card(s, 24 * GB).fits
    assert smallest_change(s, 200 * GB)[0] == {}
    assert smallest_change(s, GB) is None
    assert smallest_change(replace(s, recompute="layer"), 9 * GB)[0] == dict(recompute="mlp_host")
    change, fit = smallest_change(replace(s, recompute="host"), 8 * GB)
    assert change["batch"] * change["accumulation"] == 4 and fit.need <= 8 * GB
    assert not fit_card(replace(s, recompute="host", batch=change["batch"] * 2), 8 * GB).fits
    assert {name for kind in changes(replace(s, device="cpu")) for _, c in kind for name in c} == {"recompute", "batch", "accumulation", "length"}


def test_sizes_as_people_write_them():
    assert parse_size("24GB") == parse_size("24 GiB") == parse_size("24") == 24 * GB and parse_size("1024MiB") == GB
    for text in ("", "0GB", "GB", "-3GB", "24 apples"):
        with pytest.raises(UserError, match="write a size"):
            parse_size(text)


def measured(setup, timeout=400):
    """Predicted and measured bytes, from a process of its own."""
    done = subprocess.run([sys.executable, ROOT / "dev/measure_memory.py", json.dumps(setup)], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["logits", "layers"])
def test_two_steps_on_a_cpu_take_what_was_predicted(shape, case):
    """Within a tenth of the increase of RssAnon: Python's own objects and packing buffers of matrix products are not counted. The first model weighs 300 MB
    and peaks at its logits; the second peaks in a layer's backward pass."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True)
    if case == "logits":
        folder, extra = shape("llama", vocab_size=65536, num_hidden_layers=6, **sizes), dict(batch=2, length=96, recompute="none", dropout=0.05)
    else:
        folder, extra = shape("llama", vocab_size=4096, num_hidden_layers=2, **sizes), dict(batch=2, length=320, recompute="layer")
    result = measured(dict(base_model=folder, dtype="float32", device="cpu", **extra))
    print(result)
    assert result["when"] == {"logits": "loss", "layers": "backward"}[case]
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.10)
    if case == "logits":
        assert result["totals"]["load"] > 300e6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch, recompute", [(1, "layer"), (4, "layer"), (1, "none"), (4, "host"), (4, "mlp_host"), (4, "mlp"), (4, "dense")])
@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"])
def test_two_steps_on_a_card_take_what_was_predicted(model, batch, recompute):
    """Random weights, made on the card in NF4; PyTorch's own count is exact, so 5 % is for what its kernels take inside."""
    setup = dict(base_model=model, batch=batch, length=2048, recompute=recompute, accumulation=2, device="cuda")
    if not fit_card(Setup(**setup), torch.cuda.get_device_properties(0).total_memory).fits:
        pytest.skip("more than this card has")
    result = measured(setup, timeout=900)
    print(f"{result['card']}: {model}, {batch} × 2048, recompute {recompute}: predicted {result['predicted'] / GB:.2f} GB at {result['when']}, "
          f"allocated {result['measured'] / GB:.2f}, reserved {result['reserved'] / GB:.2f}")
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.05)


MEASURED = [json.loads(line) for line in (Path(__file__).parents[2]/"nbs/studies/stage_speed.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case["case"])
def test_the_stages_take_what_a_card_measured(case):
    """8B, 4 × 2048, every layer recomputed, on one H200. At stage 3 the head is whole while the last layers go forward, which is the peak; 2 %, as DeepSpeed reserves a
    bucket at stages 1 and 2 that it does not fill."""
    choice = {"stage 1": dict(stage=1), "stage 2": dict(stage=2), "stage 3, memory": dict(stage=3, offload_param="cpu"), "stage 3, disk": dict(stage=3, offload_param="nvme"),
              "stage 3, memory, 12 buffers": dict(stage=3, offload_param="cpu", buffers=12)}.get(case["case"], {})
    found = predict(Setup("llama-3.1-8b", 4, 2048, packed=True, **choice))
    assert found.peak / GB == pytest.approx(case["peak_gb"], rel=0.02)
    assert found.when == ("forward" if "stage 3" in case["case"] else "backward")


def test_thousands_of_rows_are_predicted_as_if_each_chunk_were_followed(monkeypatch):
    import qlora_kit.memory.predict as kit

    s = Setup("smollm2-135m", batch=300)
    assert s.batch * s.length > kit.MANY
    quick = trace(s)
    trace.cache_clear()
    monkeypatch.setattr(kit, "MANY", 10**9)
    assert trace(s) == quick
    trace.cache_clear()


def recipes():
    from qlora_kit.tools.commands import recipe_names

    return recipe_names()


def test_there_is_a_recipe_for_each_shape_and_card():
    found = {re.fullmatch(r"(.+)-\d+x(\d+)gb", name).groups() for name in recipes()}
    assert found == {(m, c) for m in ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b") for c in ("16", "24", "48", "80")}


@pytest.mark.parametrize("name", recipes())
def test_recipes_load_and_fit(name, tmp_path):
    """In a project's configs/ folder, as the first line of each says, and on the cards that its name says."""
    from qlora_kit.run.config import load_config
    from qlora_kit.tools.commands import ASSETS
    from qlora_kit.memory.budget import choose_levels
    from qlora_kit.run.assemble import memory_setup

    for folder in ("configs", "data"):
        (tmp_path / folder).mkdir()
    shutil.copyfile(ASSETS / f"recipes/{name}.yaml", tmp_path / f"configs/{name}.yaml")
    shutil.copyfile(ASSETS / "scaffold/data/sample_data.json", tmp_path / "data/sample_data.json")
    cfg = load_config(tmp_path / f"configs/{name}.yaml")
    cards, memory = map(int, re.search(r"(\d+)x(\d+)gb$", name).groups())
    setup = choose_levels(memory_setup(cfg, cfg.model.base_model, "cuda", ranks=cards), cfg.training.recompute, memory * GB)
    assert setup.packed and fit_card(setup, memory * GB).fits
    assert setup.batch * setup.accumulation * cards == 8
    assert not {"layer", "host"} & set(levels_of(setup))  # no layer is computed twice as a whole
    text = (ASSETS / f"recipes/{name}.yaml").read_text()
    assert f"plan {name} --gpus {cards} --gpu-memory {memory}GB" in text and (cards == 1 or f"--ranks {cards}" in text)


def test_a_recipe_is_listed_written_once_and_looked_for_under_a_wrong_name(tmp_path, monkeypatch, capsys):
    from qlora_kit.tools.commands import ASSETS, run_app

    monkeypatch.chdir(tmp_path)
    assert run_app(["recipe"]) == 0 and capsys.readouterr().out.split() == recipes()
    assert run_app(["recipe", "llama-3.1-8b-1x24gb"]) == 0
    written = tmp_path / "configs/llama-3.1-8b-1x24gb.yaml"
    assert written.read_text() == (ASSETS / "recipes/llama-3.1-8b-1x24gb.yaml").read_text()
    written.write_text("mine")
    assert run_app(["recipe", "llama-3.1-8b-1x24gb"]) == 2 and written.read_text() == "mine"
    capsys.readouterr()
    for command in (["recipe"], ["plan", "--gpu-memory", "24GB"]):
        assert run_app([*command, "Llama-3.1-8B-1x24G"]) == 2
        assert "did you mean llama-3.1-8b-1x24gb" in "".join(capsys.readouterr())
    assert run_app(["plan", "llama-3.1-70b-2x48gb", "--ranks", "2", "--gpu-memory", "48GB"]) == 0  # as the advice of a plan spells it


def test_the_plan_command(tmp_path, capsys):
    from qlora_kit.tools.commands import run_app

    assert run_app(["plan", "llama-3.1-8b-1x24gb", "--gpu-memory", "24GB", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and said["peak"] == max(sum(parts.values()) for parts in said["moments"].values()) < said["need"] < said["limit"] == 24 * GB
    assert run_app(["plan", "llama-3.1-8b-1x24gb", "training.recompute=none", "training.batch_size=4", "--gpu-memory", "24GB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "Smallest change: training.recompute=mlp" in out and "packed weights" in out
    assert run_app(["plan", "llama-3.1-70b-4x24gb", "--gpus", "4", "--gpu-memory", "24GB", "--bandwidth", "25"]) == 0
    out = capsys.readouterr().out
    assert "512:" in out and "receives per step" in out
    for words in (["plan", "no_such.yaml"], ["plan", "llama-3.1-8b-1x24gb", "--gpu-memory", "big"],
                  ["plan", "llama-3.1-8b-1x24gb", "--gpu-memory", "24GB", "--bandwidth", "0"]):
        assert run_app(words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    (tmp_path / "own.yaml").write_text("model: {base_model: nobody/nothing-at-all}\ndata: {train_file: rows.json}\n")
    assert run_app(["plan", str(tmp_path / "own.yaml"), "--gpu-memory", "24GB"]) == 2
    assert "llama-3.1-70b" in capsys.readouterr().err


def test_a_run_says_what_it_needs_and_refuses_what_cannot_be(tiny_config, monkeypatch, capsys):
    import qlora_kit.run.assemble as assemble
    import qlora_kit.run.train as module
    from qlora_kit.run.config import load_config

    path = tiny_config("planned", training__max_steps=2)
    result = module.train(load_config(path), path.stem, base=path.parent)
    assert "predicted at the peak" in capsys.readouterr().err
    kept = json.loads((result.run / "summary.json").read_text())
    assert 0 < kept["mem_predicted_gb"] == pytest.approx(kept["mem_peak_gb"], rel=0.5)  # both with all that this process held before
    monkeypatch.setattr(assemble, "memory_limit", lambda place: (10_000, 10_000))
    monkeypatch.setattr(assemble, "build_model", lambda *args: pytest.fail("allocated all the same"))
    with pytest.raises(UserError, match=r"--force"):
        module.train(load_config(path), path.stem, base=path.parent, quiet=True)
    assert not (path.parent / "runs/planned-2").exists()
    monkeypatch.undo()
    monkeypatch.setattr(assemble, "memory_limit", lambda place: (10_000, 10_000))
    assert module.train(load_config(path), path.stem, base=path.parent, quiet=True, force=True).status == "done"


def test_the_advice_is_in_the_words_of_the_config():
    from qlora_kit.run.config import override
    from qlora_kit.run.assemble import as_words, WORDS

    change = dict(recompute="layer", batch=2, accumulation=2, length=512, stage=3, offload_param="cpu", offload_optimizer="cpu")
    assert set(WORDS) == {*change, "ranks"}
    values = override({}, as_words(change).split())
    assert values["training"] == dict(recompute="layer", batch_size=2, gradient_accumulation_steps=2, max_length=512)
    assert values["deepspeed"] == dict(stage=3, offload_param="cpu", offload_optimizer="cpu")


def test_the_peak_of_loading_is_what_a_card_measured():
    """8B, quantized by eight threads: at least the peak that the bench wrote down, since a run must fit, and at most 6 % above."""
    lines = map(json.loads, (Path(__file__).parents[2] / "nbs/studies/peers.jsonl").read_text(encoding="utf-8").splitlines())
    line = [x for x in lines if (x["task"], x["who"], x["shape"]) == ("load", "kit", "llama-3.1-8b")][-1]
    predicted = predict(Setup(line["shape"], device="cuda", dtype="bfloat16")).totals["load"] / GB
    assert line["peak_gb"] <= predicted <= 1.06 * line["peak_gb"]
