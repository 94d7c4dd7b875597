"The loader against transformers' own, and against checkpoints, hubs and processes that misbehave."
import json, os, subprocess, sys, time
from pathlib import Path

import pytest, torch
from bitsandbytes import functional, nn as bnb
from bitsandbytes.nn import Linear4bit
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from qlora_kit.model import base, loader
from qlora_kit.data.files import UserError
from qlora_kit.model.loader import load_model, packed_hash, quantization_config, read_config
from qlora_kit.model.base import load_tokenizer, resolve_base

LLAMA = dict(vocab_size=300, hidden_size=64, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)


def save(folder, config, dtype=torch.bfloat16, **args):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **args)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    gpt2 = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return {"llama": save(root/"llama", LlamaConfig(**LLAMA)),
            "tied": save(root/"tied", LlamaConfig(**LLAMA, tie_word_embeddings=True)),
            "sharded": save(root/"sharded", LlamaConfig(**LLAMA), torch.float32, max_shard_size="100KB"),
            "gpt2": save(root/"gpt2", gpt2)}


def theirs(folder, quant_type="nf4", double_quant=True, quant_storage="uint8", dtype=torch.float32, device="cpu"):
    "transformers' own, computing as on a CPU that cannot multiply bf16: elsewhere bitsandbytes rewrites its weights."
    config = quantization_config(quant_type, double_quant, quant_storage, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map={"": device})
    for module in model.modules():
        if isinstance(module, Linear4bit): module.support_avx512bf16_for_cpu = False
    return model


def contents(model):
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in list(tensors.items()):
        if state := getattr(tensor, "quant_state", None):
            tensors |= {f"{name}/{k}": v for k, v in state.as_dict().items() if isinstance(v, Tensor)}
            if state.nested: tensors[f"{name}/offset"] = state.offset
    return {k: (type(v), v.dtype, v.shape, v.requires_grad, v.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
            for k, v in tensors.items()}


@pytest.mark.parametrize("name,args", [
    ("llama", {}), ("llama", {"quant_storage": "bfloat16"}), ("llama", {"quant_storage": "float32", "double_quant": False}),
    ("llama", {"quant_type": "fp4", "dtype": torch.float16}), ("llama", {"quant_type": "none", "dtype": torch.bfloat16}),
    ("tied", {"dtype": torch.bfloat16}), ("sharded", {}), ("sharded", {"dtype": torch.bfloat16}),
    ("gpt2", {}), ("gpt2", {"quant_storage": "bfloat16", "dtype": torch.bfloat16}), ("gpt2", {"quant_type": "none"})])
def test_equals_transformers(folders, name, args, monkeypatch):
    monkeypatch.setattr(loader, "run_length", lambda device: 1000)  # many runs a matrix
    rng = torch.get_rng_state()
    ours = load_model(folders[name], **args)
    assert torch.equal(rng, torch.get_rng_state())
    reference = theirs(folders[name], **args)
    assert contents(ours) == contents(reference)
    assert ours.config.to_dict() == reference.config.to_dict() and not ours.training
    assert getattr(ours, "is_loaded_in_4bit", False) == getattr(reference, "is_loaded_in_4bit", False)
    with torch.no_grad():
        ids = torch.arange(8)[None]
        assert torch.equal(ours(ids).logits, reference(ids).logits)


def test_smollm2_equals_transformers_and_keeps_its_template():
    folder = resolve_base("smollm2-135m-instruct")
    ours = load_model(folder)
    assert contents(ours) == contents(theirs(folder))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.generation_config.eos_token_id == load_tokenizer(folder).eos_token_id == 2
    assert "<|im_start|>user\nHi<|im_end|>" in load_tokenizer(folder).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False)


def test_bitsandbytes_stays_as_it_is_and_our_linears_keep_their_bytes(folders, monkeypatch):
    assert bnb.modules.has_avx512bf16 is functional.has_avx512bf16
    seen = []
    for answer in (False, True):
        monkeypatch.setattr(bnb.modules, "has_avx512bf16", lambda: answer)  # what a new linear asks
        model = load_model(folders["gpt2"])
        before = packed_hash(model)
        with torch.no_grad(): seen.append(model(torch.arange(8)[None]).logits)
        assert packed_hash(model) == before
    assert torch.equal(*seen)


def test_generation_defaults_come_from_their_file(folders, tmp_path):
    folder = save(tmp_path/"m", LlamaConfig(**LLAMA))
    (folder/"generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "do_sample": True}))
    assert load_model(folder).generation_config.eos_token_id == [7, 8]


WATCH = """
import ctypes, gc, re, sys, threading, time
from pathlib import Path
from qlora_kit.model.loader import load_model
def anon(): return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])/1024
load_model(sys.argv[2]); gc.collect(); ctypes.CDLL("libc.so.6").malloc_trim(0)
start, peak, running = anon(), 0, True
def sample():
    global peak
    while running: peak = max(peak, anon() - start); time.sleep(0.001)
thread = threading.Thread(target=sample); thread.start()
model = load_model(sys.argv[1]); running = False; thread.join()
print(peak, sum(p.numel()*p.element_size() for p in model.parameters())/2**20)
"""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name,args", [("llama", {}), ("gpt2", {"dtype": torch.bfloat16, "quant_storage": "bfloat16"})])
def test_equals_transformers_on_cuda(folders, name, args, monkeypatch):
    monkeypatch.setattr(loader, "run_length", lambda device: 1000)
    ours = load_model(folders[name], **args, device="cuda")
    assert {t.device.type for t in [*ours.parameters(), *ours.buffers()]} == {"cuda"}
    assert contents(ours) == contents(theirs(folders[name], **args, device="cuda"))


def test_threads_carry_tensors_over_small_buffers(folders, monkeypatch):
    "The way to a card, with ordinary memory for the pinned and for the card's."
    class Event:
        def record(self, stream): pass
        def synchronize(self): pass
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **args: empty(*size, **args))
    for name, stub in {"Event": Event, "current_stream": lambda device: None, "set_device": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    straight, carried = loader.Tensors(folders["sharded"]), loader.Tensors(folders["sharded"])
    carried.carrier = loader.PinnedReader("cpu", size=1000, threads=3)
    parts = [(name, a, b) for name in straight for n in [straight.whole(name).numel()] for a, b in ((0, n), (n//3, n//2), (1, n - 1))]
    for (name, a, b), got in zip(parts, carried.each(lambda part: loader.read_flat(carried[part[0]], *part[1:]), parts)):
        assert torch.equal(got, straight.whole(name).flatten()[a:b]), (name, a, b)
    assert carried.bytes == sum(4*(b - a) for _, a, b in parts)


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_memory_stays_below_the_model_and_one_tensor(folders, tmp_path):
    shape = LLAMA | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, vocab_size=1024)
    big = save(tmp_path/"big", LlamaConfig(**shape))
    out = subprocess.run([sys.executable, "-c", WATCH, big, folders["llama"]], capture_output=True, text=True, check=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak, size = map(float, out.stdout.split()[-2:])
    assert peak < size + 1024*4096*4/2**20, (peak, size)


def edit(source, target, tensors=lambda t: t, **config):
    target.mkdir()
    save_file(tensors(load_file(source/"model.safetensors")), target/"model.safetensors")
    (target/"config.json").write_text(json.dumps(json.loads((source/"config.json").read_text()) | config))
    return target


@pytest.mark.parametrize("tensors,config,says", [
    (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}, {}, r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    (lambda t: t | {"model.extra.weight": torch.ones(2)}, {}, r"unexpected: model\.extra\.weight"),
    (lambda t: t, {"intermediate_size": 128}, r"has shape \[144, 64\], config.json asks for \[128, 64\]"),
    (lambda t: t, {"tie_word_embeddings": True}, r"different values; set tie_word_embeddings to false"),
    (lambda t: t, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, r"already quantized \(bitsandbytes\)"),
    (lambda t: t, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                           "bnb_4bit_use_double_quant": True}}, r"missing: model\.layers\.0\.self_attn\.q_proj\.weight\.absmax"),
    (lambda t: t, {"model_type": "nonesuch"}, "cannot build a model"),
    (lambda t: t, {"model_type": "t5"}, "encoder–decoder")])
def test_checkpoints_that_do_not_fit(folders, tmp_path, tensors, config, says):
    with pytest.raises(UserError, match=says): load_model(edit(folders["llama"], tmp_path/"bad", tensors, **config))


@pytest.mark.parametrize("name,args", [("llama", {}), ("llama", {"quant_storage": "float32", "double_quant": False, "quant_type": "fp4"}),
                                       ("tied", {"quant_storage": "bfloat16", "dtype": torch.bfloat16}), ("gpt2", {"dtype": torch.float16})])
def test_a_checkpoint_that_was_saved_quantized(folders, tmp_path, name, args, monkeypatch):
    monkeypatch.setattr(loader, "run_length", lambda device: 1000)
    theirs(folders[name], **args).save_pretrained(tmp_path/"packed")
    reference, ours = theirs(tmp_path/"packed", **args), load_model(tmp_path/"packed", **args)
    assert contents(ours) == contents(reference)
    assert packed_hash(ours) == packed_hash(load_model(folders[name], **args))
    assert packed_hash(load_model(tmp_path/"packed", **args | {"quant_storage": "uint8"})) == packed_hash(ours)
    with torch.no_grad(): assert torch.equal(ours(torch.arange(8)[None]).logits, reference(torch.arange(8)[None]).logits)


@pytest.mark.parametrize("args,says", [({"quant_type": "fp4"}, "received fp4, the checkpoint's weights are quantized with nf4"),
                                       ({"quant_type": "none"}, "received none"), ({"double_quant": False}, "set double_quant to True")])
def test_what_a_quantized_checkpoint_has_settled(folders, tmp_path, args, says):
    theirs(folders["llama"]).save_pretrained(tmp_path/"packed")
    with pytest.raises(UserError, match=says): load_model(tmp_path/"packed", **args)


@pytest.mark.parametrize("change", [lambda t: {k: v[:-1] if k.endswith("1.mlp.up_proj.weight") else v for k, v in t.items()},
                                    lambda t: {k: v for k, v in t.items() if not k.endswith("1.mlp.up_proj.weight.quant_map")}])
def test_packed_matrices_that_do_not_fit(folders, tmp_path, change):
    theirs(folders["llama"]).save_pretrained(tmp_path/"packed")
    with pytest.raises(UserError, match=r"1\.mlp\.up_proj\.weight"): load_model(edit(tmp_path/"packed", tmp_path/"bad", change))


@pytest.mark.parametrize("a,b", [(0, 210), (0, 0), (7, 7), (3, 5), (5, 7), (6, 8), (1, 209), (100, 106), (70, 140)])
def test_any_stretch_of_any_tensor(tmp_path, a, b):
    for shape in [(210,), (30, 7), (5, 6, 7), (210, 1)]:
        x = torch.randn(shape)
        save_file({"x": x}, tmp_path/"model.safetensors")
        tensors = loader.Tensors(tmp_path)
        assert torch.equal(loader.read_flat(tensors["x"], a, b), x.flatten()[a:b]) and tensors.bytes == 4*(b - a)
    assert torch.equal(loader.read_turned(tensors["x"], a, b), x.T.flatten()[a:b])


def test_computed_buffers_and_a_bare_decoder_are_accepted(folders, tmp_path):
    bare = edit(folders["gpt2"], tmp_path/"bare", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}
                | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)})
    old = edit(folders["llama"], tmp_path/"old", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert contents(load_model(bare)) == contents(load_model(folders["gpt2"]))
    assert contents(load_model(old)) == contents(load_model(folders["llama"]))


def test_a_file_cut_short(folders, tmp_path):
    cut = edit(folders["llama"], tmp_path/"cut")
    data = (cut/"model.safetensors").read_bytes()
    (cut/"model.safetensors").write_bytes(data[:len(data)//2])
    with pytest.raises(UserError, match="cut short"): load_model(cut)


def test_a_folder_that_is_written_again_is_read_again(folders, tmp_path):
    folder = edit(folders["llama"], tmp_path/"again")
    before = packed_hash(load_model(folder))
    save_file({k: -v for k, v in load_file(folder/"model.safetensors").items()}, folder/"new")
    (folder/"new").rename(folder/"model.safetensors")
    assert packed_hash(load_model(folder)) != before


def test_matrices_of_odd_size(tmp_path):
    odd = save(tmp_path/"odd", LlamaConfig(**LLAMA | dict(intermediate_size=75, num_hidden_layers=1)), torch.float32)
    assert contents(load_model(odd)) == contents(theirs(odd))


def test_storage_that_cannot_hold_the_bytes():
    like = loader.Params4bit(torch.empty(3, 6, device="meta"), quant_storage=torch.float32)
    with pytest.raises(UserError, match="use quant_storage uint8"): loader.pack_matrix(lambda a, b: torch.ones(b - a), like, "cpu")


def test_hash_sees_one_flipped_bit_and_no_adapter(folders):
    from peft import LoraConfig, get_peft_model
    model = load_model(folders["llama"])
    before = packed_hash(model)
    assert packed_hash(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))) == before
    model.model.layers[1].mlp.up_proj.base_layer.weight.data[5] ^= 1
    assert packed_hash(model) != before


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"


def pickled(source, target, parts=1):
    target.mkdir()
    (target/"config.json").write_text((source/"config.json").read_text())
    (target/"tokenizer_config.json").write_text("{}")
    tensors = {k: v for f in sorted(source.glob("*.safetensors")) for k, v in load_file(f).items()}
    names = [f"pytorch_model-{i + 1:05d}-of-{parts:05d}.bin" if parts > 1 else "pytorch_model.bin" for i in range(parts)]
    places = {k: names[i % parts] for i, k in enumerate(tensors)}
    for name in names: torch.save({k: v for k, v in tensors.items() if places[k] == name}, target/name)
    if parts > 1: (target/"pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return target


@pytest.mark.parametrize("parts", [1, 3])
def test_bin_is_converted_once(folders, tmp_path, cache, capfd, parts):
    old = pickled(folders["llama"], tmp_path/"old", parts)
    first = resolve_base(str(old))
    assert first.parent == cache and (first/"tokenizer_config.json").exists() and not list(first.glob("*.bin*"))
    assert contents(load_model(first)) == contents(load_model(folders["llama"]))
    assert resolve_base(str(old)) == first
    out, err = capfd.readouterr()
    assert out == "" and err.count("Converting old to safetensors, once") == 1


def test_an_edited_template_beside_a_bin_is_read_again(folders, tmp_path, cache):
    old = pickled(folders["llama"], tmp_path/"old")
    (old/"chat_template.jinja").write_text("one")
    first = resolve_base(str(old))
    (old/"chat_template.jinja").write_text("another")
    assert (first/"chat_template.jinja").read_text() == "one" and (resolve_base(str(old))/"chat_template.jinja").read_text() == "another"


def test_an_encoder_decoder_is_no_base(tmp_path):
    from transformers import BartConfig

    BartConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bart is an encoder–decoder"): read_config(tmp_path)


def test_a_pickle_that_would_run_code_is_refused(folders, tmp_path, cache):
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/"ran",))
    old = pickled(folders["llama"], tmp_path/"old")
    torch.save({"model.norm.weight": Evil()}, old/"pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be converted"): resolve_base(str(old))
    assert not (tmp_path/"ran").exists() and not [p for p in cache.iterdir() if p.is_dir()]


CONVERT = """
import sys, time
from pathlib import Path
from qlora_kit.model.base import convert_once
def write(source, folder):
    (folder/"a").write_text("a"); time.sleep(float(sys.argv[1])); (folder/"b").write_text("b")
print(sorted(p.name for p in convert_once(Path("model.gguf"), (1,), write).iterdir()), flush=True)
"""


def test_conversion_survives_a_kill_and_a_crowd(cache):
    run = lambda seconds: subprocess.Popen([sys.executable, "-c", CONVERT, str(seconds)], stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, text=True)
    victim, deadline = run(600), time.monotonic() + 120
    try:
        while not list(cache.glob("*/a")) and time.monotonic() < deadline: time.sleep(0.05)
        assert list(cache.glob("*.part/a"))
    finally: victim.kill(); victim.wait()
    assert not [p for p in cache.iterdir() if p.is_dir() and p.suffix != ".part"]
    crowd = [p.communicate(timeout=120) for p in [run(1), run(1)]]
    assert [out for out, _ in crowd] == ["['a', 'b']\n"]*2
    assert sum(err.count("Converting") for _, err in crowd) == 1 and not list(cache.glob("*.part"))


def test_gguf_that_is_none(tmp_path, cache):
    (tmp_path/"x.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match="cannot be converted"): resolve_base(str(tmp_path/"x.gguf"))


@pytest.mark.parametrize("error,says", [
    (hub_errors.LocalEntryNotFoundError("offline"), "hub cannot be reached.*smollm2-135m-instruct"),
    (hub_errors.HFValidationError("a/b/c"), "not a hub id.*smollm2-135m-instruct")])
def test_hub_errors_name_what_to_use(monkeypatch, error, says):
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(base, "snapshot_download", fail)
    with pytest.raises(UserError, match=says): resolve_base("owner/model")


def test_hub_fetches_safetensors_first_and_only_what_is_needed(folders, tmp_path, cache, monkeypatch):
    asked = []
    def fetch(repo, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, allow_patterns[0]))
        return str(folders["llama"] if repo == "new" else old if "bin" in allow_patterns[0] else tmp_path)
    old = pickled(folders["llama"], tmp_path/"old")
    monkeypatch.setattr(base, "snapshot_download", fetch)
    monkeypatch.setattr(base, "find_spec", lambda package: None)
    assert resolve_base("new", "v1") == folders["llama"]
    assert resolve_base("old").parent == cache
    resolve_base("SmolLM2-135M-Instruct")  # its package is not installed
    assert asked == [("new", "v1", "model*.safetensors"), ("old", None, "model*.safetensors"), ("old", None, "pytorch_model*.bin"),
                     ("HuggingFaceTB/SmolLM2-135M-Instruct", None, "model*.safetensors"),
                     ("HuggingFaceTB/SmolLM2-135M-Instruct", None, "pytorch_model*.bin")]


def test_folders_that_hold_no_model(tmp_path):
    (tmp_path/"adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(UserError, match="is an adapter.*owner/base"): resolve_base(str(tmp_path))
    (tmp_path/"empty").mkdir()
    with pytest.raises(UserError, match="holds no model"): resolve_base(str(tmp_path/"empty"))
    (tmp_path/"empty"/"m.gguf").touch()
    with pytest.raises(UserError, match="name one file.*m.gguf"): resolve_base(str(tmp_path/"empty"))
