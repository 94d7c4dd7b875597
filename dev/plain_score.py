"""The held-out score of a run's adapter, computed with transformers and peft and nothing of the kit.

    python dev/plain_score.py runs/demo [--at-least 0.9]
"""
import argparse
import json
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def answers(run, rows, batch_size=36):
    """Greedy answers of the adapter on its base in NF4 with double quantization."""
    adapter = run / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"})
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
    system = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["system_prompt"]
    start = [{"role": "system", "content": system}] if system is not None else []
    out = []
    for i in range(0, len(rows), batch_size):
        chats = [[*start, {"role": "user", "content": "\n\n".join(t for t in (r["instruction"], r["input"]) if t)}] for r in rows[i : i + batch_size]]
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        out += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def right(answer, expected):
    try:
        return json.loads(answer) == json.loads(expected)
    except ValueError:
        return answer.strip() == expected.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--at-least", type=float, default=0.0)
    args = parser.parse_args()
    score_file = yaml.safe_load((args.run / "config.yaml").read_text(encoding="utf-8"))["data"]["score_file"]
    rows = json.loads(Path(score_file).read_text(encoding="utf-8"))
    score = sum(right(a, r["output"]) for a, r in zip(answers(args.run, rows), rows)) / len(rows)
    ours = json.loads((args.run / "summary.json").read_text())["score_after"]
    print(f"plain peft: {score:.4f}, the run says {ours:.4f}, {len(rows)} rows")
    assert score >= args.at_least, f"{score:.4f} is below {args.at_least}"
    assert abs(score - ours) <= 1 / len(rows) + 1e-9, "the two scores differ by more than one row"
