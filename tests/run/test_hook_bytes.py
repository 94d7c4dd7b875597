"""A model of the user's own keeps its packed bytes, whatever processor it runs on."""
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.model.loader import load_model, packed_hash
from qlora_kit.run.assemble import build_model
from qlora_kit.run.config import load_config

HOOK = '''import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

def create_model(base_model_name, lora_config, *, folder, dtype):
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                              bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, quantization_config=form, dtype=dtype), lora_config)
'''


@pytest.mark.parametrize("bf16", [False, True])
def test_a_users_model_keeps_its_bytes(tiny_llama, tiny_config, monkeypatch, tmp_path, bf16):
    if bf16:
        from bitsandbytes import functional
        if not functional.has_avx512bf16():
            pytest.skip("this processor does not multiply bf16")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: bf16)
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"users{bf16:d}.py").write_text(HOOK)
    cfg = load_config(tiny_config("c", model__create_model=f"users{bf16:d}.create_model"))
    model = build_model(cfg, tiny_llama, base=tmp_path)
    before = packed_hash(load_model(tiny_llama))
    with torch.no_grad():
        model.eval()(torch.arange(8)[None])
    assert packed_hash(model) == before
