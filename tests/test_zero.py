"""DeepSpeed files: what `auto` becomes, and what is refused."""
import pytest

from qlora_kit.data import UserError
from qlora_kit.zero import check_storage, read_deepspeed, resolve, zero_config

BUILT = zero_config(micro_batch=4, accumulation=2, max_grad_norm=0.5, dtype="bfloat16", hidden_size=64, offload_optimizer="cpu")


def test_auto_takes_the_runs_value_and_additions_stay():
    file = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
            "train_batch_size": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": "auto",
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "sub_group_size": 10**8, "overlap_comm": True}}
    out = resolve(file, BUILT)
    assert (out["train_micro_batch_size_per_gpu"], out["gradient_accumulation_steps"], out["gradient_clipping"]) == (4, 2, 0.5)
    assert out["bf16"] == {"enabled": True} and out["fp16"] == {"enabled": False, "loss_scale": 0}
    zero = out["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 64**2 and zero["sub_group_size"] == 10**8 and zero["overlap_comm"] is True
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
    ({"zero_optimization": {"stage": 2}}, "stage is 2; allowed: 3"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights would quantize"),
    ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "zero_quantized_nontrainable_weights would quantize"),
    ({"zero_optimization": {"reduce_bucket_sise": 1}}, r"reduce_bucket_sise is 1; did you mean reduce_bucket_size\?"),
    ({"zero_optimization": {"reduce_bucket_size": "big"}}, "zero_optimization.reduce_bucket_size is 'big'; DeepSpeed says"),
    ({"zero_optimization": {"offload_param": {"device": "auto"}}}, "offload_param.device is auto, and the run has no value"),
    ({"zero_optimization": True}, "zero_optimization is True; allowed: an object"),
    ({"gradient_clipping": {"value": 1}}, "gradient_clipping is .*; allowed: one value"),
])
def test_what_contradicts_the_run_is_refused(file, says):
    with pytest.raises(UserError, match=says): resolve(file, BUILT)


def test_choices_out_of_range():
    for wrong in (dict(stage=2), dict(dtype="float16"), dict(offload_param="nvme")):
        with pytest.raises(UserError, match="allowed"): zero_config(**wrong)


def test_packed_codes_travel_as_bytes_or_in_the_engines_dtype():
    for dtype in ("float32", "bfloat16"):
        check_storage("uint8", dtype); check_storage(dtype, dtype)
    for storage, dtype in (("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")):
        with pytest.raises(UserError, match=f"{storage} and the engine computes in {dtype}.*use uint8 or {dtype}"): check_storage(storage, dtype)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "ds.json"
    with pytest.raises(UserError, match="No such file"): read_deepspeed(path)
    for text, says in (('{"bf16": }', "not valid JSON.*line 1 column 10"), ("[1]", "holds a list")):
        path.write_text(text)
        with pytest.raises(UserError, match=says): read_deepspeed(path)
