"""The sharded loader: 1 to 4 CPU ranks against one process, bit for bit; what each reads and holds; and training on the result."""
import json
import os
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from qlora_kit.model import sharded
from qlora_kit.data.files import UserError
from qlora_kit.training.engine import free_port
from qlora_kit.model.loader import quantization_config

SIZES = dict(vocab_size=301, hidden_size=60, intermediate_size=75, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
EVEN = SIZES | dict(hidden_size=64, intermediate_size=144)


def save(folder, config, **args):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, **args)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Matrices of 60 × 75 weights end within a block, and their 2250 bytes divide among neither 4 ranks nor 4-byte elements."""
    root = tmp_path_factory.mktemp("sharded")
    save(root/"llama", LlamaConfig(**SIZES, head_dim=16), max_shard_size="50KB")
    save(root/"tied", LlamaConfig(**EVEN, tie_word_embeddings=True))
    save(root/"gpt2", GPT2Config(vocab_size=301, n_embd=52, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0))
    save(root/"qwen2", Qwen2Config(**EVEN))
    for name, args in (("packed", {}), ("packed_bf16", dict(quant_storage="bfloat16", double_quant=False))):
        settings = quantization_config("nf4", args.get("double_quant", True), args.get("quant_storage", "uint8"), torch.float32)
        AutoModelForCausalLM.from_pretrained(root/"qwen2", quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}).save_pretrained(root/name)
    (root/"broken").mkdir()
    for file in (root/"qwen2").iterdir(): (root/"broken"/file.name).write_bytes(file.read_bytes()[:40_000])
    return root


COMMON = """
import json, sys, warnings; warnings.filterwarnings("ignore")
from pathlib import Path
import torch
from qlora_kit.model import loader
from qlora_kit.data.files import UserError
from qlora_kit.training.engine import DeepSpeedEngine, join_ranks, leave, make_optimizer
from qlora_kit.model.loader import load_model, packed_hash, whole_weight
from qlora_kit.model.lora import add_lora
from qlora_kit.training.loss import LossModel
from qlora_kit.model.sharded import cast_trained, load_sharded
from qlora_kit.training.zero import zero_config
root, place = Path(sys.argv[1]), join_ranks(several=True)
device = place.device

def raw(t): return t.dtype, tuple(t.shape), t.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()

def contents(model):
    out, buffers = {}, dict(model.named_buffers(remove_duplicate=False))
    for name, p in model.named_parameters(remove_duplicate=False):
        with whole_weight(p): out[name] = type(p), p.requires_grad, raw(p.data)
        if state := getattr(p, "quant_state", None):
            parts = {k: raw(v) if isinstance(v, torch.Tensor) else v for k, v in state.as_dict().items()}
            out[f"{name}/state"] = parts, state.nested and raw(state.offset)
    return out | {k: raw(b) for k, b in buffers.items()}
"""

EQUAL = COMMON + """
loader.run_length = lambda device: 1000 # many runs a matrix
said = {}
bf16, cases = dict(dtype=torch.bfloat16), json.loads(sys.argv[2])
for name, args, offload in cases:
    if "dtype" in args: args["dtype"] = getattr(torch, args["dtype"])
    config = zero_config(hidden_size=64, dtype=str(args.get("dtype", torch.float32)).split(".")[1], offload_param=offload)
    ours, one = load_sharded(root/name, config, **args), load_model(root/name, **args, device=device)
    a, b = contents(ours), contents(one)
    assert a.keys() == b.keys() and not [k for k in a if a[k] != b[k]], (name, args, [k for k in a if a[k] != b[k]])
    assert packed_hash(ours) == packed_hash(one) and ours.config.to_dict() == one.config.to_dict() and not ours.training
    assert all(p.numel() == 0 and p.ds_tensor.numel() == -(-p.ds_numel//place.ranks) for p in ours.parameters()), "a whole tensor is still there"
    if one.config.tie_word_embeddings: assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    said[f"{name} {args}"] = ours.bytes_read

def losses(load, config, dtype, steps=6):
    model = add_lora(load(), r=4, seed=0)
    cast_trained(model, dtype) # the engine does so itself where a model comes whole
    module = LossModel(model).train()
    engine, out = DeepSpeedEngine(module, make_optimizer(module), config, place), []
    torch.manual_seed(place.rank) # GPT-2's dropout is on
    for step in range(steps):
        ids = torch.randint(0, 301, (2, 16), generator=torch.Generator().manual_seed(10*step + place.rank))
        loss = engine.forward(dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids))
        engine.backward(loss, 30*place.ranks)
        engine.step(0.01)
        out.append(engine.total(loss.item()))
    return out, packed_hash(model), engine.gather()

for name, args in (("qwen2", {}), ("tied", dict(quant_storage="float32")), ("gpt2", dict(quant_storage="bfloat16", dtype=torch.bfloat16))):
    dtype = args.get("dtype", torch.float32)
    config = zero_config(hidden_size=64, dtype=str(dtype).split(".")[1])
    (ours, hash_ours, adapter), (normal, hash_normal, expected) = (
        losses(load, config, dtype) for load in (lambda: load_sharded(root/name, config, **args), lambda: load_model(root/name, **args, device=device)))
    assert all(abs(a - b) <= 1e-5*b for a, b in zip(ours, normal)) and ours[-1] != ours[0], (name, ours, normal)
    assert hash_ours == hash_normal == packed_hash(load_model(root/name, **args, device=device))
    assert adapter.keys() == expected.keys() and all(torch.allclose(adapter[k], expected[k], rtol=1e-4, atol=1e-6) for k in adapter)

try: load_sharded(root/("broken" if place.rank == place.ranks - 1 else "qwen2"), zero_config(hidden_size=64)); raise SystemExit("broken file loaded")
except UserError as e: said["error"] = str(e)
print(json.dumps(said))
leave()
"""


def launch(script, ranks, *words, timeout=500, **env):
    env = os.environ | dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1") | env
    started = [subprocess.Popen([sys.executable, "-c", script, *map(str, words)], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(ranks)]
    try: said = [p.communicate(timeout=timeout) for p in started]
    finally:
        for p in started:
            if p.poll() is None: p.kill()
    assert [p.returncode for p in started] == [0]*ranks, "\n".join(err[-3000:] for _, err in said)
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def file_bytes(folder):
    """Bytes of every tensor in a folder's files, by name."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors: sizes |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}
    return sizes


CASES = [("llama", {}, "none"), ("llama", {"quant_storage": "bfloat16", "dtype": "bfloat16"}, "none"), ("llama", {"quant_type": "none"}, "none"),
         ("tied", {"quant_storage": "float32"}, "none"), ("tied", {"quant_type": "fp4", "double_quant": False, "dtype": "bfloat16"}, "cpu"),
         ("gpt2", {}, "none"), ("gpt2", {"quant_type": "none", "dtype": "bfloat16"}, "none"), ("gpt2", {"quant_storage": "bfloat16", "dtype": "bfloat16"}, "none"),
         ("qwen2", {}, "none"), ("qwen2", {"quant_storage": "float32"}, "none"),
         ("packed", {}, "none"), ("packed_bf16", {"quant_storage": "bfloat16", "double_quant": False, "dtype": "bfloat16"}, "none"),
         ("packed_bf16", {"double_quant": False}, "none")]


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_hold_the_model_of_one_process(folders, ranks):
    """In the ranks: every bit, hash, tied objects, and six losses to 1e-5 of the normal path's (fp32 sums in the same order differ only where
    gathers differ). Here: what was read; a share may reach 63 weights beyond each of its two ends, which on matrices this small is the 10 %."""
    said = launch(EQUAL, ranks, folders, json.dumps(CASES), DS_ACCELERATOR="cpu")
    for name, args in (("llama", {}), ("llama", {"quant_type": "none"}), ("qwen2", {}), ("tied", {"quant_storage": "float32"})):
        total = sum(file_bytes(folders/name).values())
        for rank in said: assert total/ranks*0.7 <= rank[f"{name} {args}"] <= total/ranks*1.1, (name, rank)
        assert sum(rank[f"{name} {args}"] for rank in said) >= total
    for rank in said[:-1]: assert rank["error"].startswith(f"rank {ranks - 1} could not load its part") and "cut short" in rank["error"]
    assert "cut short" in said[-1]["error"] and "could not load" not in said[-1]["error"]


MEMORY = COMMON + """
import ctypes, gc, hashlib, os, re, threading, time
libc = ctypes.CDLL("libc.so.6"); libc.mallopt(-3, 2**16) # freed memory goes back at once
def anon(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])*1024
def watch(function):
    gc.collect(); libc.malloc_trim(0)
    start, peak, running = anon(), 0, True
    def sample():
        nonlocal peak
        while running: peak = max(peak, anon() - start); time.sleep(0.0005)
    thread = threading.Thread(target=sample); thread.start()
    result = function(); running = False; thread.join()
    return result, peak
args = dict(dtype=torch.bfloat16, quant_storage="bfloat16")
config = zero_config(hidden_size=1024, dtype="bfloat16")
load_sharded(root/"qwen2", config, **args)
torch.set_num_threads(1 + place.rank % 2) # other threads, other means: rank 0's has to be everyone's
model, peak = watch(lambda: load_sharded(sys.argv[2], config, **args))
packed = sum(p.ds_tensor.nbytes for p in model.parameters() if hasattr(p, "quant_state"))
scales = sum(q.absmax.nbytes + q.state2.absmax.nbytes for q in (getattr(p, "quant_state", None) for p in model.parameters()) if q)
plain = sum(p.ds_tensor.nbytes for p in model.parameters() if not hasattr(p, "quant_state"))
digest = hashlib.sha256()
for q in (getattr(p, "quant_state", None) for p in model.parameters()):
    if q: digest.update(raw(q.absmax)[2] + raw(q.offset)[2] + raw(q.state2.absmax)[2])
disk = config | {"zero_optimization": config["zero_optimization"] | {"offload_param": {"device": "nvme", "nvme_path": str(root/"disk"), "buffer_count": 2, "buffer_size": 2**21}}}
embedding, hash_before = model.get_input_embeddings().weight, packed_hash(model)
files = []
if sys.argv[3] == "disk":
    swapped = load_sharded(sys.argv[2], disk, **args)
    files = [f.stat().st_size for f in (root/"disk").rglob(f"rank{place.rank}/*.swp")]
    moved = swapped.get_input_embeddings().weight
    with whole_weight(embedding), whole_weight(moved): assert torch.equal(embedding.data, moved.data)
    assert packed_hash(swapped) == hash_before
print(json.dumps(dict(digest=digest.hexdigest(), peak=peak, packed=packed, scales=scales, plain=plain, read=model.bytes_read, files=files)))
leave()
"""


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_a_rank_holds_its_share_and_reads_no_more(folders, tmp_path):
    """Slack: 2**20 fp32 scales travel at once, and the CPU kernel makes 16 bytes of temporaries for each of 2**16 weights; the rest is
    DeepSpeed's closures, 40 kB a parameter."""
    shape = LlamaConfig(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8, tie_word_embeddings=True)
    sizes = file_bytes(save(tmp_path/"big", shape, max_shard_size="100MB"))
    total, largest = sum(sizes.values()), max(sizes.values())
    assert total >= 300e6
    from deepspeed.ops.op_builder import AsyncIOBuilder
    disk = AsyncIOBuilder().is_compatible()
    said = launch(MEMORY, 3, folders, tmp_path/"big", "disk" if disk else "no disk", DS_ACCELERATOR="cpu")
    slack = 4*2**20 + 16*2**16 + 71*40e3
    for rank in said:
        assert rank["peak"] <= rank["packed"] + rank["scales"] + rank["plain"] + largest, rank
        assert rank["peak"] <= rank["packed"] + rank["scales"] + rank["plain"] + slack, rank
        assert rank["read"] <= total/3*1.1
        if disk: assert rank["files"] and min(rank["files"]) >= 2**20
    assert len({rank["digest"] for rank in said}) == 1, "ranks quantized the scales differently"
    assert sum(rank["packed"] for rank in said) >= 0.249*(total - largest) # all of it, between them; norms are not packed


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_ranks_on_one_card_hold_the_model_of_one_process(folders):
    """The same script: quantized by the card's kernels, gathered over gloo. Smaller than a share and its largest tensor is not asked of models this tiny."""
    cases = [("llama", {}, "none"), ("tied", {"quant_storage": "bfloat16", "dtype": "bfloat16"}, "cpu"), ("gpt2", {}, "none"),
             ("qwen2", {"quant_storage": "float32"}, "none"), ("packed", {}, "none")]
    env = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", env)
        said = launch(EQUAL, 2, folders, json.dumps(cases))
    assert said[0]["error"].startswith("rank 1 could not load its part")


@pytest.mark.parametrize("shape,storage", [((9, 40), "uint8"), ((75, 60), "bfloat16"), ((3, 16), "uint8"), ((5, 13), "uint8"), ((64, 64), "float32")])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_byte_has_one_keeper_who_reads_its_block(shape, storage, ranks):
    like = Params4bit(torch.empty(shape, device="meta"), quant_storage=getattr(torch, storage))
    kept = [sharded.own_bytes(like, r, ranks) for r in range(ranks)]
    assert kept[0][0] == 0 and kept[-1][1] == (like.numel() + 1)//2 and all(a[1] == b[0] for a, b in zip(kept, kept[1:]))
    for rank, (first, last) in enumerate(kept):
        a, b = sharded.own_weights(like, rank, ranks)
        assert a % 64 == 0 and (b % 64 == 0 or b == like.numel())
        assert (a, b) == (0, 0) if first == last else a <= 2*first < 2*last <= b + 1 and 2*first - a < 64 and b - 2*last < 64


@pytest.mark.parametrize("counts,limit", [([], 5), ([0, 0], 5), ([9], 5), ([0, 3, 3, 0, 3, 9, 0], 6), ([1]*10, 3)])
def test_batches_cover_all_and_stay_below_the_limit(counts, limit):
    cuts = sharded.slot_batches(counts, limit)
    assert [i for a, b in cuts for i in range(a, b)] == list(range(len(counts)))
    assert all(sum(counts[a:b]) <= limit or sum(c > 0 for c in counts[a:b]) == 1 for a, b in cuts)


@pytest.mark.parametrize("zero,says", [({"stage": 2}, "received 2"), ({}, "received None"), ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights"),
                                       ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size"), ({"stage": 3, "zero_hpz_partition_size": 1}, "no ranks have joined")])
def test_configs_under_which_nothing_can_be_sharded(zero, says):
    with pytest.raises(UserError, match=says): sharded.zero_init({"zero_optimization": zero}, torch.float32)
