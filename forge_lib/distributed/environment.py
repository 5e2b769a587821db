"""Environment variables of accelerate and torch that would change what is computed: they are rejected by name.

Tests compare these lists with the source code of accelerate and torch, and fail for a variable of a new version.
"""

import os

from accelerate.utils import str_to_bool

from forge_lib.errors import UserError

FALSE = ("false", "0", "no", "n", "f", "off")
# Variable -> (values without effect, what to use instead). Any other value is an error.
REJECTED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "--micro-batch-size decides how many there are"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "use --compile"),
    "ACCELERATE_TORCH_DEVICE": ((), "use --device"),
    "ACCELERATE_USE_DEEPSPEED": (FALSE, "this program trains data-parallel only"),
    "ACCELERATE_USE_FSDP": (FALSE, "this program trains data-parallel only"),
    "ACCELERATE_USE_MEGATRON_LM": (FALSE, "this program trains data-parallel only"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (FALSE, "this program trains data-parallel only"),
    "ACCELERATE_USE_SAGEMAKER": (FALSE, "this program does not run on SageMaker"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (("0",), "use --mixed-precision bf16"),
    "NVIDIA_TF32_OVERRIDE": (("0",), "use --mixed-precision bf16"),
}
# Read by accelerate, but without effect on the numbers of this program; the reason is in the comment.
HARMLESS = {
    "ACCELERATE_MIXED_PRECISION",  # compared with --mixed-precision by agreement.py
    "ACCELERATE_USE_CPU",  # device.py obeys it
    "ACCELERATE_DEBUG_RDV_FILE",  # store.py obeys it
    "ACCELERATE_NUM_PROCESSES",  # of notebook launchers
    "ACCELERATE_CPU_AFFINITY",  # binds processes to cores
    "ACCELERATE_DEBUG_MODE",  # checks shapes
    "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_BYPASS_DEVICE_MAP",  # of models on several devices
    "ACCELERATE_INIT_INCLUDE_BUFFERS",  # of models without weights in memory
    "ACCELERATE_ALLOW_CP_STANDALONE",  # only with ACCELERATE_USE_PARALLELISM_CONFIG
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE",  # only with ACCELERATE_USE_SAGEMAKER
    "ACCELERATE_DOWNCAST_BF16",  # only on TPUs
    "ACCELERATE_IN_TPU_POD",
    "ACCELERATE_GRADIENT_CLIPPING",  # only with ACCELERATE_USE_DEEPSPEED
    "ACCELERATE_CONFIG_DS_FIELDS",  # only with ACCELERATE_USE_DEEPSPEED
}
SWITCHES = {"ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"}  # true or false
# Of torch: read by DDP, process groups and autocast, without effect on the numbers.
HARMLESS_OF_TORCH = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "USE_LIBUV",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCH_DIST_INIT_BARRIER",
    "TORCH_DISTRIBUTED_DEBUG",
    "TORCH_DISTRIBUTED_USE_TORCHCOMMS",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_BUFFER_SIZE",
    "PYTORCH_DDP_USE_SIDE_STREAM",
}
# Beginnings of names that are read only together with a rejected variable, or with fp8, which is never used.
HARMLESS_BEGINNINGS = ("ACCELERATE_FP8_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_")


def check_environment() -> None:
    """Raises UserError if an environment variable would change what is computed."""
    for name, (harmless, instead) in REJECTED.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in harmless:
            raise UserError(f"the environment variable {name}={value} would change the results: unset it; {instead}")
    for name in SWITCHES & os.environ.keys():
        try:
            str_to_bool(os.environ[name])
        except ValueError:
            raise UserError(f"the environment variable {name}={os.environ[name]} is neither true nor false") from None
