"""QLoRA on DeepSpeed ZeRO-3: every module is exported from the notebook of the same name."""
