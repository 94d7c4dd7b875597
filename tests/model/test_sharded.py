"""The sharded loader: 1 to 4 CPU ranks against one process, bit for bit; what each reads and holds."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from qlora_kit.model import sharded
from qlora_kit.model.flat import ALIGN, FlatWeights, Segment
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
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import torch
from qlora_kit.model import loader
from qlora_kit.data.files import UserError
from qlora_kit.training.engine import join_ranks, leave
from qlora_kit.model.loader import load_model, packed_hash
from qlora_kit.model.flat import on_demand
from qlora_kit.model.sharded import load_sharded
root, place = Path(sys.argv[1]), join_ranks(several=True)
device = place.device

def raw(t): return t.dtype, tuple(t.shape), t.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()

def rows_of(model): return list({id(m.flat): m.flat for m in model.modules() if hasattr(m, "flat")}.values())

def contents(model):
    out = {k: raw(b) for k, b in model.named_buffers(remove_duplicate=False)}
    with on_demand(model):
        for path, module in model.named_modules():
            for name in ("weight", "bias"):
                t = getattr(module, name, None)
                if not isinstance(t, torch.Tensor): continue
                out[f"{path}.{name}"] = raw(t.data)
                if state := getattr(t, "quant_state", None):
                    parts = {k: raw(v) if isinstance(v, torch.Tensor) else v for k, v in state.as_dict().items()}
                    out[f"{path}.{name}/state"] = type(t), parts, state.nested and raw(state.offset)
    return out
"""

EQUAL = COMMON + """
loader.run_length = lambda device: 1000 # many runs a matrix
said = {}
for name, args, offload in json.loads(sys.argv[2]):
    if "dtype" in args: args["dtype"] = getattr(torch, args["dtype"])
    ours = load_sharded(root/name, **args, device=device, offload=offload)
    one = load_model(root/name, **args, device=device, quiet=True)
    a, b = contents(ours), contents(one)
    assert a.keys() == b.keys() and not [k for k in a if a[k] != b[k]], (name, args, [k for k in a if a[k] != b[k]])
    assert packed_hash(ours) == packed_hash(one) and ours.config.to_dict() == one.config.to_dict() and not ours.training
    rows = rows_of(ours)
    assert all(row.data is None and len(row.share) == row.part for row in rows), "a whole row is still there"
    assert sum(row.part for row in rows) <= sum(row.size for row in rows)/place.ranks + 256*len(rows)
    if one.config.tie_word_embeddings: assert ours.get_output_embeddings().flat is ours.get_input_embeddings().flat
    said[f"{name} {args}"] = ours.bytes_read

try: load_sharded(root/("broken" if place.rank == place.ranks - 1 else "qwen2"), device=device)
except UserError as e: said["error"] = str(e)
else: raise SystemExit("broken file loaded")
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
    """In the ranks: every bit, hash, and what is kept. Here: what was read. Nothing is read twice but norms and biases, which are the 10 %, and tied tensors that
    a checkpoint holds twice. A row is cut in pieces of 256 bytes, so on models this small a rank may get a third less than its part of the file, or more."""
    said = launch(EQUAL, ranks, folders, json.dumps(CASES), DS_ACCELERATOR="cpu")
    for name, args in (("llama", {}), ("llama", {"quant_type": "none"}), ("qwen2", {}), ("tied", {"quant_storage": "float32"})):
        total = sum(file_bytes(folders/name).values())
        for rank in said: assert total/ranks*0.6 <= rank[f"{name} {args}"] <= total/ranks*1.4, (name, rank)
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
load_sharded(root/"qwen2", **args)
torch.set_num_threads(1 + place.rank % 2) # other threads, other means: rank 0's has to be everyone's
model, peak = watch(lambda: load_sharded(sys.argv[2], **args))
kept, digest = sum(row.part for row in rows_of(model)), hashlib.sha256()
with on_demand(model):
    for m in model.modules():
        if q := getattr(getattr(m, "weight", None), "quant_state", None): digest.update(raw(q.absmax)[2] + raw(q.offset)[2] + raw(q.state2.absmax)[2])
print(json.dumps(dict(digest=digest.hexdigest(), peak=peak, kept=kept, read=model.bytes_read)))
leave()
"""


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_a_rank_holds_its_share_and_reads_no_more(folders, tmp_path):
    """Slack: the scales of a layer in fp32 and quantized, and the CPU kernel makes 16 bytes of temporaries for each of 2**16 weights."""
    shape = LlamaConfig(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8, tie_word_embeddings=True)
    sizes = file_bytes(save(tmp_path/"big", shape, max_shard_size="100MB"))
    total, largest = sum(sizes.values()), max(sizes.values())
    layer = sum(n for name, n in sizes.items() if ".layers.0." in name)/2 # weights
    assert total >= 300e6
    said = launch(MEMORY, 3, folders, tmp_path/"big", DS_ACCELERATOR="cpu")
    for rank in said:
        assert rank["peak"] <= rank["kept"] + 2*5*layer/64 + 16*2**16 + 4*2**20, rank
        assert rank["read"] <= total/3*1.1
    assert len({rank["digest"] for rank in said}) == 1, "ranks quantized the scales differently"
    packed = (total - largest)/2*(0.5 + 1/64)
    assert packed + largest <= sum(rank["kept"] for rank in said) <= 1.01*(packed + largest)


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


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_byte_has_one_keeper_and_no_block_has_two(ranks):
    shapes = [((180, 1), torch.uint8), ((3,), torch.float32), ((40_000, 1), torch.uint8), ((70, 3), torch.bfloat16)]
    rows = [FlatWeights(rank, ranks) for rank in range(ranks)]
    for shape, dtype in shapes:
        segment = [row.add(shape, dtype) for row in rows][0]
    for segment in (Segment(0, (180, 1), torch.uint8), segment):
        cuts = [row.own(segment) for row in rows]
        assert cuts[0][0] == 0 and cuts[-1][1] == segment.stop - segment.start
        assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
        assert all(cut % ALIGN == 0 for cut, _ in cuts if cut not in (0, segment.stop - segment.start))
    assert rows[0].part*ranks >= rows[0].size > rows[0].part*(ranks - 1) or ranks > rows[0].size//ALIGN
    for row in rows:
        row.share = torch.zeros(row.part, dtype=torch.uint8)
        row.keep_part(segment, torch.arange(210).to(torch.bfloat16))
    rows[-1].set_data(torch.cat([row.share for row in rows]))
    assert torch.equal(rows[-1].view(segment), torch.arange(210).to(torch.bfloat16).view(70, 3))


def test_a_divided_weight_cannot_be_replaced_and_not_trained(folders):
    model = sharded.load_sharded(folders/"qwen2", quant_type="none")
    line = model.model.layers[0].mlp.up_proj
    with pytest.raises(AttributeError, match="divided among the ranks"), line.flat.whole(): line.weight = torch.nn.Parameter(torch.zeros(2, 2))
    with line.flat.whole(): line.weight = line.weight # PEFT does this on a CPU
    line.note = 3 # other attributes are free
    assert "model.layers.0.mlp.up_proj.weight" not in dict(model.named_parameters()) and isinstance(line, torch.nn.Linear)


def test_a_stack_of_matrices_is_refused(tmp_path):
    from transformers import Qwen3MoeConfig

    shape = Qwen3MoeConfig(**EVEN, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=144, head_dim=16)
    with pytest.raises(UserError, match="stack of 64 matrices|only parts of the model's tensors"): sharded.load_sharded(save(tmp_path/"moe", shape))
