"""Tiny real checkpoints: random weights of a Llama and a GPT-2, with a byte-level tokenizer of their own."""
import json
import os
import platform
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if platform.machine() in ("x86_64", "AMD64"):  # the same random numbers and sums on every processor, as in the notebooks' stored outputs; set before torch is imported
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder, template=CHATML):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture
def same_arithmetic(monkeypatch):
    """Plain `Linear4bit` computes in the model's dtype on every processor, as the kit's do; with AVX512-BF16 it would rewrite its weights and compute in bf16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a two-layer Llama, hidden width 64, untied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    vocab = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_like_qwen(tmp_path_factory):
    """A run that has learned four answers, on a base whose template ends answers with <|im_end|> and whose EOS, in tokenizer and model, is <|endoftext|>."""
    import torch
    import yaml
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qlora_kit.tools.commands import run_app

    folder = tmp_path_factory.mktemp("like_qwen")
    vocab = save_tokenizer(folder/"base")
    tokenizer = AutoTokenizer.from_pretrained(folder/"base")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder/"base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False)).save_pretrained(folder/"base")
    rows = [{"instruction": q, "input": "", "output": a} for q, a in (("a?", "yes"), ("b?", "no"), ("c?", "12"), ("d?", "so"))]
    (folder/"rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder/"c.yaml").write_text(yaml.safe_dump({
        "model": {"base_model": str(folder/"base"), "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0},
        "data": {"train_file": "rows.json", "validation_split": 0, "score": "exact_match", "score_file": "rows.json"},
        "training": {"num_epochs": 60, "batch_size": 4, "learning_rate": 0.02, "max_length": 96, "output_dir": str(folder/"run")}}), encoding="utf-8")
    assert run_app(["train", str(folder/"c.yaml")]) == 0
    return folder


def write_rows(path, n=24):
    """Alpaca rows with answers of unequal lengths."""
    rows = [{"instruction": f"Count to {i % 7 + 1}.", "input": "", "output": " ".join(str(j + 1) for j in range(i % 7 + 1))} for i in range(n)]
    Path(path).write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def tiny_config(tiny_llama, tmp_path):
    """A config file of a run that takes a second or two; returns a function that writes it with changes."""
    write_rows(tmp_path / "rows.json")

    def write(name="tiny", **changes):
        import yaml

        values = {
            "model": {"base_model": str(tiny_llama), "lora_r": 4, "lora_dropout": 0.1},
            "training": {"num_epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "max_length": 96,
                         "save_steps": 3, "eval_steps": 4, "save_total_limit": 50, "output_dir": str(tmp_path / "runs" / name)},
            "data": {"train_file": "rows.json", "validation_split": 0.2},
        }
        for key, value in changes.items():
            section, name_ = key.split("__")
            values.setdefault(section, {})[name_] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


TIMED = ("tokens_per_s", "samples_per_s", "mem_gb", "mem_peak_gb", "elapsed_s")


def run(path, *overrides, **options):
    """Train a config file."""
    from qlora_kit.run.config import load_config
    from qlora_kit.run.train import train

    return train(load_config(path, overrides), path.stem, quiet=True, base=path.parent, **options)


def losses(result):
    """The records of a run without what a clock or the machine decides."""
    from qlora_kit.run.monitor import read_metrics

    return [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(result.run)]


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step; dropout on, accumulation 2."""
    import yaml

    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "rows.json")
    values = {
        "model": {"base_model": str(tiny_llama), "lora_r": 4, "lora_dropout": 0.1},
        "training": {"num_epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "max_length": 96,
                     "save_steps": 1, "eval_steps": 4, "save_total_limit": 50, "output_dir": str(folder / "runs/whole")},
        "data": {"train_file": "rows.json", "validation_split": 0.2},
    }
    path = folder / "whole.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, run(path)


@pytest.fixture(autouse=True)
def the_library_as_it_was():
    """Runs replace the library's rotary embedding for the whole process; the next test starts without."""
    yield
    if pointwise := sys.modules.get("qlora_kit.model.kernels"):
        for module in [m for name, m in sys.modules.items() if name.startswith("transformers.models.")]:
            function = vars(module).get("apply_rotary_pos_emb")
            if getattr(function, "func", None) is pointwise._rotary: module.apply_rotary_pos_emb = function.args[0]
