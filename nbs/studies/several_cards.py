"""Measures ZeRO-3 on two cards of one host; the study `several_cards` shows what it found.

    python nbs/studies/several_cards.py --part 1     two ranks against one process, to the byte
    python nbs/studies/several_cards.py --part 2     loading 8B, 32B and 70B
    python nbs/studies/several_cards.py --part 3     throughput, memory and traffic at stages 0, 2 and 3
    python nbs/studies/several_cards.py --part 4     70B with optimizer and parameters in the CPU's memory
    python nbs/studies/several_cards.py --part 5     stage 3 beside stage 2: two layers whole at a time, and as many as fit

A part is a few launches of two processes. It takes five minutes at most, deletes its files, and adds its numbers to a file of JSON lines.
`--only` picks one launch; `--tiny` runs everything on two CPU ranks.
"""
import argparse, gc, hashlib, json, os, shutil, signal, subprocess, sys, tempfile, threading, time
import importlib.metadata as metadata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"NCCL_NVLS_ENABLE": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # NVLink multicast stays off

import pandas as pd
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.data.batches import target_weight
from qlora_kit.data.files import GB
from qlora_kit.memory.budget import fit_card, more_buffers, traffic
from qlora_kit.memory.predict import Setup, shape_text, stand_in
from qlora_kit.model.base import INDEX
from qlora_kit.model.flat import FlatWeights, keep_scales, move_in, on_demand, packed_weight
from qlora_kit.model.kernels import fast_pointwise
from qlora_kit.model.linear import fast_linears
from qlora_kit.model.loader import (
    finish_model, load_model, packed_hash, quantization_config, scales, skeleton, slots)
from qlora_kit.model.lora import add_lora, save_adapter
from qlora_kit.model.sharded import lay_out, load_sharded, sort_tensors
from qlora_kit.run.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, State
from qlora_kit.run.monitor import resident_bytes
from qlora_kit.training.engine import (
    DeepSpeedEngine, free_port, join_ranks, leave, LocalEngine, make_optimizer, RankInfo)
from qlora_kit.training.loss import LossModel
from qlora_kit.training.recompute import set_levels
from qlora_kit.training.zero import zero_config

CUDA, W = torch.cuda.is_available(), 2
DTYPE = torch.bfloat16 if CUDA else torch.float32
SMALL = dict(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4)
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=144, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)

@dataclass
class Study:
    """One process of a launch, and where it reads and writes."""
    part: int
    out: Path      # JSON lines
    scratch: Path  # empty at first, deleted after the part
    tiny: bool
    place: RankInfo

    def note(self, **values):
        """Add a line to the results; only rank 0 writes."""
        line = dict(part=self.part, date=time.strftime("%Y-%m-%d"), card=torch.cuda.get_device_name() if CUDA else "CPU", **values)
        if self.place.rank: return
        with open(self.out, "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\n")

    def everywhere(self, value):
        """The value of every rank, in order."""
        found = [None] * self.place.ranks
        dist.all_gather_object(found, value)
        return found

    def shape(self, name):
        """config.json of a well-known shape."""
        return json.loads(shape_text(name)) | (TINY if self.tiny else {})

class Watch:
    """Within `with`: `seconds`, and the peaks above the start of `card` and `host` memory in GB (2**30 bytes)."""

    def __enter__(self):
        gc.collect()
        if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        if dist.is_initialized(): dist.barrier()
        self.card_before, self.host_before, self.most = torch.cuda.memory_allocated() if CUDA else 0, resident_bytes(), 0
        self.running, self.thread = True, threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        self.start = time.monotonic()
        return self

    def look(self):
        while self.running: self.most = max(self.most, resident_bytes()); time.sleep(0.01)

    def __exit__(self, *_):
        if CUDA: torch.cuda.synchronize()
        self.seconds, self.running = time.monotonic() - self.start, False
        self.thread.join()
        self.host, self.card = (self.most - self.host_before) / GB, ((torch.cuda.max_memory_allocated() if CUDA else 0) - self.card_before) / GB

def prepare(model):
    """Update and fast forms, in the order of a training run."""
    model = add_lora(model, 16, 32, seed=0)
    fast_linears(model); fast_pointwise(model); set_levels(model, "layer")
    return LossModel(model).train()

def make_engine(module, zero, place, buffers=2):
    """For several ranks, or for one."""
    return DeepSpeedEngine(module, make_optimizer(module), zero, place, buffers) if zero else LocalEngine(module, make_optimizer(module), 1.0, place.device)

# Part 1: two ranks against one process

def sha256(tensors):
    digest = hashlib.sha256()
    for t in tensors: digest.update(t.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()

def hashes(study, model):
    """Packed bytes, and scales; an error if ranks differ."""
    digest, layers = hashlib.sha256(), [m for m in model.modules() if isinstance(m, Linear4bit)]
    with on_demand(model):
        for m in layers:
            state = m.weight.quant_state or m.quant_state
            for t in (state.absmax, state.offset, state.state2.absmax): digest.update(sha256([t]).encode())
    said = dict(packed=packed_hash(model), scales=digest.hexdigest())
    assert study.place.ranks == 1 or study.everywhere(said) == [said] * W
    return said

def rows(study, step, vocab):
    """Four rows, the first two with half of the targets; a rank takes its part of them."""
    ids = torch.randint(vocab, (4, 16 if study.tiny else 256), generator=torch.Generator().manual_seed(step % 4))
    labels = ids.clone()
    labels[:2, :ids.shape[1] // 2] = -100
    each = 4 // study.place.ranks
    mine = slice(each * study.place.rank, each * (study.place.rank + 1))
    return dict(input_ids=ids[mine], labels=labels[mine])

def learn(study, name, dtype, start=None):
    """Train to step 20, from the beginning or from another run's step 10; leave losses, hashes, adapter and a checkpoint of step 10."""
    place, folder, args = study.place, study.scratch / f"{name}-{dtype}", dict(dtype=getattr(torch, dtype))
    zero = zero_config(3, 4 // W, dtype=dtype, hidden_size=SMALL["hidden_size"]) if place.ranks > 1 else None
    base = load_sharded(study.scratch / "model", **args, device=place.device) if zero else load_model(study.scratch / "model", **args, device=place.device, quiet=True)
    said, losses, module = dict(loaded=hashes(study, base)), [], prepare(base)
    engine = make_engine(module, zero, place)
    if start:
        state = load_checkpoint(newest_checkpoint(study.scratch / f"{start}-{dtype}"))
        engine.load(state.tensors, state.step)
    for step in range(10 if start else 0, 20):
        batch = rows(study, step, base.config.vocab_size)
        n = engine.total(target_weight(batch))
        loss = engine.forward(batch)
        engine.backward(loss, n)
        losses.append(engine.total(loss.item()) / n)
        engine.step(1e-3)
        tensors = engine.state() if step == 9 else None
        if tensors and place.rank == 0: save_checkpoint(folder, State(10, tensors))
    said |= dict(trained=hashes(study, module), losses=losses)
    adapter = engine.gather()
    if place.rank: return
    save_adapter(module.model, SimpleNamespace(save_pretrained=lambda folder: None), folder / "adapter", base_model="random", state=adapter)  # random ids have no tokenizer
    (folder / "said.json").write_text(json.dumps(said))

def two_ranks(study, name, start=None):
    """Both dtypes; the first launch writes the model."""
    if not start and study.place.rank == 0:
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SMALL | (TINY if study.tiny else {}))
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(study.scratch / "model")
    dist.barrier()
    for dtype in ("float32", "bfloat16"): learn(study, name, dtype, start)

def one_process(study):
    """The same twenty steps, then the last ten from the two ranks' checkpoint; and all of them compared."""
    for dtype in ("float32", "bfloat16"):
        learn(study, "one", dtype)
        learn(study, "two to one", dtype, "two")
        said = {name: json.loads((study.scratch / f"{name}-{dtype}/said.json").read_text()) for name in ("one", "two", "resumed", "two to one")}
        adapters = {name: load_file(study.scratch / f"{name}-{dtype}/adapter/adapter_model.safetensors") for name in said}
        seen = [s[moment] for s in said.values() for moment in ("loaded", "trained")]
        common = dict(what="equal", dtype=dtype, packed=len({h["packed"] for h in seen}) == 1, scales=len({h["scales"] for h in seen}) == 1,
                      adapter_tensors=len(adapters["two"]), adapter_numbers=sum(t.numel() for t in adapters["two"].values()))
        for a, b in (("two", "one"), ("resumed", "two"), ("two to one", "two")):
            pairs = list(zip(said[a]["losses"][::-1], said[b]["losses"][::-1]))
            study.note(**common, compared=f"{a} with {b}", loss=max(abs(x - y) / y for x, y in pairs), adapter=distance(adapters[a], adapters[b]), losses=pairs[::-1])

def distance(a, b):
    """Length of the difference of two adapters over the length of the second; other names or shapes are an error."""
    assert {k: t.shape for k, t in a.items()} == {k: t.shape for k, t in b.items()}
    a, b = (torch.cat([tensors[k].double().flatten() for k in sorted(tensors)]) for tensors in (a, b))
    return float((a - b).norm() / b.norm())

# Part 2: loading

@dataclass
class Load:
    shape: str
    packed: bool           # saved in 4 bits already
    compared: float = 1.0  # share of the layers in the comparison, where all of them take too long

LOADS = [Load("llama-3.1-8b", False), Load("llama-3.1-70b", True), Load("qwen2.5-32b", False, 3 / 8)]

def write_checkpoint(folder, config, packed, device, seconds=40):
    """Random numbers, a file for each layer with the same ones, as many layers as time and disk allow; what `index` needs beside a number of layers."""
    model, parts = stand_in(json.dumps(config), "nf4" if packed else "none", dtype=torch.bfloat16, device=device, keep=1), {"layer-0": {}, "ends": {}}
    model.config.save_pretrained(folder)
    for name, tensor in model.state_dict().items(): parts["layer-0" if ".layers.0." in name else "ends"][name] = tensor.cpu().contiguous()
    for name, tensors in parts.items(): save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    raw, end = (folder / "layer-0.safetensors").read_bytes(), time.monotonic() + seconds
    layers = min(config["num_hidden_layers"], int(0.9 * shutil.disk_usage(folder).free / len(raw)))
    with ThreadPoolExecutor(16) as pool: written = sum(pool.map(lambda i: time.monotonic() < end and repeat_layer(raw, folder, i), range(1, layers)))
    return list(parts["layer-0"]), list(parts["ends"]), 1 + written

def repeat_layer(raw, folder, i):
    """Layer 0's file under the names of layer i."""
    n = int.from_bytes(raw[:8], "little")
    header = raw[8:8 + n].decode().strip().replace(".layers.0.", f".layers.{i}.").encode()
    header += b" " * (-len(header) % 8)
    with open(folder / f"layer-{i}.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(memoryview(raw)[8 + n:])
    return True

def index(folder, layer, ends, layers):
    """Give a checkpoint its first layers only; its bytes."""
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    files = dict.fromkeys(ends, "ends.safetensors") | {k.replace(".layers.0.", f".layers.{i}."): f"layer-{i}.safetensors" for i in range(layers) for k in layer}
    (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=files)))
    return sum((folder / name).stat().st_size for name in set(files.values()))

def load_transformers(folder, device):
    """The whole model on every rank."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config("nf4", True, "uint8", DTYPE), dtype=DTYPE, device_map={"": device})

def loading(study):
    """Each shape: every rank its share, and transformers on every rank."""
    for load in LOADS:
        folder, config, start = study.scratch / load.shape, study.shape(load.shape), time.monotonic()
        folder.mkdir(exist_ok=True)
        layer, ends, layers = study.everywhere(study.place.rank == 0 and write_checkpoint(folder, config, load.packed, study.place.device))[0]
        common = dict(what="load", shape=load.shape, saved="nf4" if load.packed else "bf16", of_layers=config["num_hidden_layers"],
                      files="memory" if "shm" in str(folder) else "disk, just written", write_s=time.monotonic() - start)
        for how, run, n in (("shares", partial(load_sharded, folder, dtype=DTYPE, device=study.place.device), layers),
                            ("transformers", partial(load_transformers, folder, study.place.device), max(1, int(load.compared * layers)))):
            size = study.everywhere(study.place.rank == 0 and index(folder, layer, ends, n))[0]
            study.note(**common, how=how, layers=n, checkpoint_gb=size / GB, **timed_load(study, run, size))
        if study.place.rank == 0: shutil.rmtree(folder)

def timed_load(study, load, size):
    """What it takes, one entry for each rank; who does not count its bytes reads all of them."""
    with Watch() as watch: model = load()
    said = study.everywhere(dict(seconds=watch.seconds, read_gb=getattr(model, "bytes_read", size) / GB, card_gb=watch.card, host_gb=watch.host))
    return {k: [s[k] for s in said] for k in said[0]}

# Parts 3 and 4: training

def sharded_stand_in(text, place, offload):
    """What `load_sharded` makes of a checkpoint, with random numbers."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text)
        model = skeleton(Path(folder), quantization_config("nf4", True, "uint8", DTYPE), DTYPE, place.device)
        rows, rest = sort_tensors(model, [(slot, []) for slot in slots(model) if isinstance(getattr(*slot[0][:2]), torch.nn.Parameter)])
        for slot, _ in rest:
            like = getattr(*slot[0][:2])
            for module, name, _ in slot: setattr(module, name, torch.nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device=place.device).normal_(0, 0.02)))
        for found in rows:
            flat = FlatWeights(place.rank, place.ranks, place.device)
            for (slot, _), segments in zip(found, lay_out(flat, found, offload)):
                make = random_share(flat, getattr(*slot[0][:2]), segments)
                for module, *_ in slot: move_in(flat, module, make)
        return finish_model(model, Path(folder))

def random_share(flat, like, segments):
    """This rank's random part of a tensor; how to look it up."""
    first, last = flat.own(segments[0] if isinstance(segments, tuple) else segments)
    if not isinstance(segments, tuple):
        flat.keep(segments, torch.empty((last - first) // like.itemsize, dtype=like.dtype, device=flat.device).normal_(0, 0.02))
        return partial(FlatWeights.view, segment=segments)
    flat.keep(segments[0], torch.empty(last - first, dtype=torch.uint8, device=flat.device).random_(256))
    state = scales(torch.full((-(-like.numel() // 64),), 0.05, device=flat.device), like)
    keep_scales(flat, segments, state)
    return partial(packed_weight, like=like, state=state, segments=segments)

class Received(TorchDispatchMode):
    """Within `with`: `bytes` that collectives bring to this rank (an all-reduce is a reduce-scatter and an all-gather), and how many `calls` there are."""
    bytes = calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            first, second = (sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args[:2])
            self.bytes += 2 * first * (W - 1) // W if "allreduce" in str(function) else abs(first - second)
            self.calls += 1
        return function(*args, **(kwargs or {}))

def collective_seconds(step):
    """Seconds that kernels of collectives run on the card, waiting for the other rank included, in one step."""
    with profile() as prof:
        step()
        if CUDA: torch.cuda.synchronize()
    return sum(e.self_device_time_total if CUDA else e.cpu_time_total for e in prof.key_averages() if e.key.startswith("ncclDevKernel" if CUDA else "gloo:")) / 1e6

def measure(study, setup, text, warm, timed, deep):
    """Build and train; one entry for each rank."""
    place, zero = study.place, None
    if setup.ranks > 1:
        zero = zero_config(setup.stage, setup.batch, dtype=str(DTYPE)[6:], hidden_size=json.loads(text)["hidden_size"], offload_param=setup.offload_param, offload_optimizer=setup.offload_optimizer)
    torch.manual_seed(place.rank if setup.stage == 3 else 0)
    with Watch() as built:
        module = prepare(sharded_stand_in(text, place, setup.offload_param) if setup.stage == 3 else stand_in(text, dtype=DTYPE, device=place.device))
        engine = make_engine(module, zero, place, setup.buffers)
    ids = torch.randint(500, (setup.batch, setup.length), generator=torch.Generator().manual_seed(study.place.rank))
    def step():
        loss = engine.forward(dict(input_ids=ids, labels=ids))
        engine.backward(loss, ids.numel() * setup.ranks)
        engine.step(1e-4)
        return loss.item() / ids.numel()
    for _ in range(warm): step()
    with Watch() as watch: losses = [step() for _ in range(timed)]
    card = (watch.card_before - built.card_before) / GB + watch.card
    said = dict(build_s=built.seconds, step_s=watch.seconds / timed, card_gb=card, host_gb=max(built.most, watch.most) / GB - built.host_before / GB, loss=losses[-1], losses=losses)
    if deep and zero:
        said["collective_s"] = collective_seconds(step)
        with torch.compiler.set_stance("force_eager"), Received() as received: step()
        said |= dict(received=received.bytes, calls=received.calls)
    if zero: engine.ds.destroy()
    return said

def training(study, shape, batch, cases, warm=2, timed=4, deep=True):
    """All cases of a shape, one after the other; one that does not fit, or fails, does not stop the next."""
    folder, text = study.scratch / shape, json.dumps(study.shape(shape))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text) if study.place.rank == 0 else None
    dist.barrier()
    base = Setup(str(folder), batch, 16 if study.tiny else 2048, packed=True, dtype=str(DTYPE)[6:], device="cuda" if CUDA else "cpu")
    for case, change in cases:
        setup, limit = replace(base, **change), torch.cuda.mem_get_info()[1] if CUDA else 2**40
        if setup.buffers == MANY: setup = more_buffers(setup, limit)
        fit = fit_card(setup, limit)
        labels = dict(what="train", shape=shape, case=case, layers=study.shape(shape)["num_hidden_layers"], batch=batch, length=setup.length, ranks=setup.ranks, change=change, buffers=setup.buffers,
                      predicted_gb=fit.prediction.peak / GB, predicted_elsewhere_gb=sum(fit.prediction.elsewhere.values()) / GB, predicted_traffic=sum(traffic(setup).values()))
        if not fit.fits: study.note(**labels, skipped=f"needs {fit.need / GB:.1f} GB of {fit.limit / GB:.1f}"); continue
        try: said = study.everywhere(measure(study, setup, text, warm, timed, deep))
        except Exception as e: study.note(**labels, failed=f"{type(e).__name__}: {e}"[:300]); continue
        study.note(**labels, tokens_per_s=setup.ranks * batch * setup.length / max(s["step_s"] for s in said), **{k: [s[k] for s in said] for k in said[0]})

def link(study):
    """10⁹ bytes a second that a rank receives, by the bytes of the whole tensor."""
    for size in [2**k for k in ((12,) if study.tiny else (20, 23, 26, 29))]:
        whole = torch.zeros(size // 4, device=study.place.device)
        part = whole[:len(whole) // W].clone()
        for name, run, received in (("all-gather", lambda: dist.all_gather_into_tensor(whole, part), size / W), ("all-reduce", lambda: dist.all_reduce(whole), size)):
            for rounds in (5, 20):
                with Watch() as watch:
                    for _ in range(rounds): run()
            study.note(what="link", collective=name, bytes=size, gb_per_s=received * 20 / watch.seconds / 1e9)

TWO, MANY = dict(ranks=W), 10**6 # MANY buffers: as many as fit
PLAIN = [("one card", {}), *[(f"stage {n}", TWO | dict(stage=n)) for n in (0, 2, 3)]]
OPTIMIZER = [("optimizer on the CPU", TWO | dict(stage=3, offload_optimizer="cpu"))]
ALL_AWAY = [("parameters and optimizer on the CPU", TWO | dict(stage=3, offload_param="cpu", offload_optimizer="cpu"))]
train_8b, train_70b = partial(training, shape="llama-3.1-8b", batch=4), partial(training, shape="llama-3.1-70b", batch=1)
away = partial(train_70b, warm=1, timed=2, deep=False)
WAYS = [("stage 2", TWO | dict(stage=2)), ("stage 3, two layers whole", TWO | dict(stage=3)), ("stage 3, layers kept", TWO | dict(stage=3, buffers=MANY))]

LAUNCHES = {1: {"two": partial(two_ranks, name="two"), "resumed": partial(two_ranks, name="resumed", start="two"), "one": one_process},
            2: {"load": loading},
            3: {"8b": lambda study: (link(study), train_8b(study, cases=PLAIN)), "70b": partial(train_70b, cases=PLAIN)},
            4: {"optimizer": partial(away, cases=OPTIMIZER), "all": partial(away, cases=ALL_AWAY)},
            5: {"ways": partial(train_8b, cases=WAYS, warm=4, timed=6)}}

def launch(args, name, seconds):
    """Start the ranks of one launch and wait; what is not done in time is ended."""
    starter = [] if name == "one" else ["-m", "deepspeed.launcher.runner", f"--num_gpus={W}", f"--master_port={free_port()}"]
    words = ["--part", args.part, "--rank-of", name, "--out", args.out, "--scratch", args.scratch, *["--tiny"] * args.tiny]
    process = subprocess.Popen([sys.executable, *starter, __file__, *map(str, words)], start_new_session=True)
    try: return process.wait(max(1, seconds))
    except subprocess.TimeoutExpired: return "out of time"
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)

def be_rank(args):
    """One process of a launch."""
    study = Study(args.part, args.out, args.scratch, args.tiny, join_ranks(several=args.rank_of != "one"))
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")} | dict(nccl=torch.cuda.nccl.version() if CUDA else None)
    study.note(what="machine", launch=args.rank_of, ranks=study.place.ranks, cores=len(os.sched_getaffinity(0)), versions=versions)
    LAUNCHES[args.part][args.rank_of](study)
    leave()

def show(lines):
    """The numbers in short: means over ranks, a table for each kind."""
    short = lambda v: round(sum(v) / len(v), 3) if isinstance(v, list) else float(f"{v:.4g}") if isinstance(v, float) else v
    for what in dict.fromkeys(line["what"] for line in lines if line["what"] != "machine"):
        kept = [{k: short(v) for k, v in line.items() if k not in ("part", "date", "card", "what", "losses", "change")} for line in lines if line["what"] == what]
        print(pd.DataFrame(kept).to_string(index=False), "\n")
    for line in lines:
        if line["what"] == "train" and "losses" in line: print(f"{line['case']}: losses of rank 0 {line['losses'][0]}")

def main(args):
    """The launches of a part, then the tables; 1 if a launch failed."""
    start, before = time.monotonic(), args.out.read_text().count("\n") if args.out.exists() else 0
    args.scratch = Path(tempfile.mkdtemp(prefix="several-cards-", dir=max(filter(os.path.isdir, ("/dev/shm", tempfile.gettempdir())), key=lambda p: shutil.disk_usage(p).free)))
    names = [name for name in LAUNCHES[args.part] if args.only in (None, name)]
    try: ends = {name: launch(args, name, args.seconds - (time.monotonic() - start)) for name in names}
    finally: shutil.rmtree(args.scratch, ignore_errors=True)
    show([json.loads(line) for line in args.out.read_text().splitlines()[before:]])
    print(f"part {args.part}: {time.monotonic() - start:.0f} s; launches ended with {ends}")
    return int(any(ends.values()))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=LAUNCHES, required=True)
    parser.add_argument("--only", help="; ".join(f"of part {part}: {', '.join(names)}" for part, names in LAUNCHES.items()))
    parser.add_argument("--out", type=lambda p: Path(p).resolve(), default=Path(__file__).with_suffix(".jsonl"), help="file of JSON lines")
    parser.add_argument("--seconds", type=float, default=300, help="of the part")
    parser.add_argument("--tiny", action="store_true")
    for internal in ("--rank-of", "--local_rank"): parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.exit(be_rank(args) if args.rank_of else main(args))
