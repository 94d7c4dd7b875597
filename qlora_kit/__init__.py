"""QLoRA on DeepSpeed ZeRO-3: every module is exported from the notebook of the same name."""
import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR) # on a CPU with bf16 it asks for a package that the kit has no use for
