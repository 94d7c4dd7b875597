"""DeepSpeed files: what `auto` becomes, and what is refused."""
import json
import os
import re
from importlib.resources import files
from types import SimpleNamespace

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from qlora_kit.data.files import UserError
from qlora_kit.training.zero import (
    check_devices, check_storage, read_deepspeed, resolve, zero_config)

BUILT = zero_config(micro_batch=4, accumulation=2, max_grad_norm=0.5, dtype="bfloat16", hidden_size=64, offload_optimizer="cpu")


def test_auto_takes_the_runs_value_and_additions_stay():
    file = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
            "train_batch_size": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": "auto",
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "round_robin_gradients": True, "overlap_comm": True}}
    out = resolve(file, BUILT)
    assert (out["train_micro_batch_size_per_gpu"], out["gradient_accumulation_steps"], out["gradient_clipping"]) == (4, 2, 0.5)
    assert out["bf16"] == {"enabled": True} and out["fp16"] == {"enabled": False, "loss_scale": 0}
    zero = out["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 64**2 and zero["round_robin_gradients"] is True and zero["overlap_comm"] is True
    assert zero["offload_optimizer"] == {"device": "cpu"} and "optimizer" not in out and "auto" not in str(out)
    assert BUILT["zero_optimization"]["overlap_comm"] is False and file["scheduler"] == "auto", "an argument was changed"


@pytest.mark.parametrize("file,says", [
    ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu is 8, but the run says 4"),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, but the run says 2"),
    ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but the run says 0.5"),
    ({"bf16": {"enabled": False}}, "bf16.enabled is False, but the run says True"),
    ({"fp16": {"enabled": True}}, "fp16.enabled is True, but the run says False"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer is set, but the run's config owns it"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "scheduler is set"),
    ({"train_batch_size": 32}, "train_batch_size is set"),
    ({"zero_optimization": {"stage": 4}}, "stage is 4; allowed: 0, 1, 2, 3"),
    ({"zero_optimization": {"stage": 2}}, "stage is 2, but the run says 3"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, "offload_optimizer.device is 'none', but the run says 'cpu'"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "nvme_path is missing"),
    ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size is 8: a second copy.*allowed: 1"),
    ({"activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing sets up a function.*training.recompute"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights would quantize"),
    ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "zero_quantized_nontrainable_weights would quantize"),
    ({"zero_optimization": {"reduce_bucket_sise": 1}}, r"reduce_bucket_sise is 1; did you mean reduce_bucket_size\?"),
    ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size is 'big'; DeepSpeed says"),
    ({"zero_optimization": {"offload_param": {"device": "auto"}}}, "offload_param.device is auto, and the run has no value"),
    ({"zero_optimization": True}, "zero_optimization is True; allowed: an object"),
    ({"gradient_clipping": {"value": 1}}, "gradient_clipping is .*; allowed: one value"),
])
def test_what_contradicts_the_run_is_refused(file, says):
    fixed = ("zero_optimization.stage", "zero_optimization.offload_optimizer.device")
    with pytest.raises(UserError, match=says): resolve(file, BUILT, fixed=fixed if "the run says" in says else ())


# The two examples of transformers' documentation ("DeepSpeed", sections ZeRO-2 and ZeRO-3), as people copy them.
HF = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}
HF2 = HF | {"zero_optimization": {
    "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
    "reduce_scatter": True, "reduce_bucket_size": 2e8, "contiguous_gradients": True}}
HF3 = HF | {"bf16": {"enabled": "auto"}, "zero_optimization": {
    "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True,
    "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True}}


@pytest.mark.parametrize("file,stage", [(HF2, 2), (HF3, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_of_the_transformers_documentation_are_taken_as_they_are(file, stage, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig

    out = resolve(file, zero_config(micro_batch=4, accumulation=2, dtype=dtype, hidden_size=64))
    assert "auto" not in json.dumps(out) and out["zero_optimization"]["stage"] == stage
    assert out["bf16"]["enabled"] == (dtype == "bfloat16") and out["fp16"]["enabled"] == (dtype == "float16") and out["fp16"]["hysteresis"] == 2
    assert out["data_types"] == {"grad_accum_dtype": "fp32"} and out["train_micro_batch_size_per_gpu"] == 4
    theirs = DeepSpeedConfig(out, mesh_device=None) # every section through DeepSpeed's own schemas
    assert theirs.zero_config.stage == stage and theirs.zero_config.offload_optimizer.device == "cpu"


def test_a_file_may_choose_the_stage_and_the_sums_follow():
    built = zero_config(dtype="bfloat16", hidden_size=64)
    assert resolve({"zero_optimization": {"stage": 0}}, built)["data_types"] == {"grad_accum_dtype": "bf16"} # DeepSpeed refuses another one there
    assert resolve({"zero_optimization": {"stage": 1}}, zero_config(0, dtype="bfloat16"))["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolve({"data_types": {"grad_accum_dtype": "bf16"}}, built)["data_types"] == {"grad_accum_dtype": "bf16"}


def test_the_shipped_file_serves_every_run():
    shipped = json.loads((files("qlora_kit") / "assets/scaffold/configs/deepspeed_config.json").read_text())
    assert "train_batch_size" not in shipped
    for dtype in ("float32", "bfloat16", "float16"):
        built = zero_config(micro_batch=3, dtype=dtype, hidden_size=64)
        assert resolve(shipped, built) == built


@pytest.mark.parametrize("choice,says", [
    (dict(stage=4), "stage is 4; allowed: 0, 1, 2, 3"), (dict(dtype="int8"), "dtype is 'int8'; allowed"), (dict(offload_param="disk"), "allowed: none, cpu, nvme"),
    (dict(stage=2, offload_param="cpu"), "offload_param is cpu at stage 2"), (dict(stage=0, offload_optimizer="cpu"), "offload_optimizer is cpu at stage 0"),
    (dict(stage=2, offload_optimizer="nvme", nvme_path="/x", dtype="bfloat16"), "nvme at stage 2; allowed there: none, cpu"),
    (dict(offload_param="nvme", dtype="bfloat16"), "nvme_path is missing"),
])
def test_choices_that_cannot_work(choice, says):
    with pytest.raises(UserError, match=says): zero_config(**choice)


# zero3.json and zero3_bf16_cpuoffload_all.json of axolotl, and what accelerate writes, as far as they size DeepSpeed's own gathers.
GATHERS = [{"max_live_parameters": 0, "max_reuse_distance": 0, "sub_group_size": 0, "gather_16bit_weights_on_model_save": True},
           {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0, "stage3_gather_16bit_weights_on_model_save": "auto"}]


@pytest.mark.parametrize("keys", GATHERS)
def test_sizes_of_deepspeeds_own_gathers_have_no_effect_and_one_line_says_so(keys, capsys, monkeypatch):
    file = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7, **keys}}
    before = json.dumps(file)
    out = resolve(file, BUILT, name="mine.json")
    said = capsys.readouterr().err
    assert all((key in said) == (value != "auto") for key, value in keys.items()) and said.startswith("mine.json: ") and said.count("\n") == 1 and "deepspeed.gathered_layers" in said
    assert not set(out["zero_optimization"]) & set(keys) and out["zero_optimization"]["reduce_bucket_size"] == 7 and json.dumps(file) == before
    monkeypatch.setenv("RANK", "1")
    resolve(file, BUILT)
    resolve({"zero_optimization": {"stage": 3}}, BUILT)
    assert not capsys.readouterr().err


def test_a_model_spread_by_device_map_is_refused():
    check_devices(SimpleNamespace(hf_device_map={"": "cuda:0"})); check_devices(SimpleNamespace())
    with pytest.raises(UserError, match="device_map over 0, cpu"): check_devices(SimpleNamespace(hf_device_map={"model": 0, "lm_head": "cpu"}))


def test_packed_codes_travel_as_bytes_or_in_the_engines_dtype():
    for dtype in ("float32", "bfloat16"):
        check_storage("uint8", dtype); check_storage(dtype, dtype)
    for storage, dtype in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")):
        with pytest.raises(UserError, match=f"{storage} and the engine computes in {dtype}.*use uint8 or {dtype}"): check_storage(storage, dtype)


AXOLOTL = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
           "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False, "bf16": {"enabled": "auto"},
           "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 0, "reduce_bucket_size": "auto", "max_live_parameters": 0,
                                 "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "max_reuse_distance": 0, "gather_16bit_weights_on_model_save": True}}


@pytest.mark.parametrize("change", [{}, {"bfloat16": {"enabled": "auto"}}, {"_comment": "mine"}, {"compile": {"deepcompile": False}}, {"amp": {"enabled": False}}, {"comms_logger": {"enabled": True}},
                                    {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"}}])
def test_files_of_axolotl_and_accelerate_are_taken(change):
    """The old names of keys, `auto` where the run has no value, and sections that are off."""
    found = resolve(AXOLOTL | change, zero_config(3, 2, hidden_size=64))
    assert found["zero_optimization"]["stage"] == 3 and not {"bfloat16", "_comment", "compile", "amp"} & set(found)


@pytest.mark.parametrize("file, says", [
    ({"zero_optimisation": {"stage": 2}}, "no setting zero_optimisation; did you mean zero_optimization"), ({"gradient_cliping": 0.5}, "did you mean gradient_clipping"),
    ({"model_name_or_path": "m", "learning_rate": 1e-4}, "no setting model_name_or_path"), ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported"),
    ({"compile": {"deepcompile": True}}, "compile is not supported"), ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is not supported"),
    ({"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer wants")])
def test_keys_that_deepspeed_would_pass_over_or_that_crash_are_refused_by_plan_and_train(file, says, tmp_path, tiny_config, capsys):
    from qlora_kit.tools.commands import run_app

    with pytest.raises(UserError, match=says): resolve(file, zero_config(3, 2, hidden_size=64))
    (tmp_path / "ds.json").write_text(json.dumps(file))
    path = tiny_config("refused")
    for words in (["plan", str(path), "--ranks", "2", "--gpu-memory", "8GB"], ["train", str(path)]):
        assert run_app([*words, "--deepspeed", str(tmp_path / "ds.json")]) == 2 and re.search(says, capsys.readouterr().err)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "ds.json"
    with pytest.raises(UserError, match="No such file"): read_deepspeed(path)
    for text, says in (('{"bf16": }', "not valid JSON.*line 1 column 10"), ("[1]", "holds a list")):
        path.write_text(text)
        with pytest.raises(UserError, match=says): read_deepspeed(path)
