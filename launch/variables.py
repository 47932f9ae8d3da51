"""Which variables of the launcher's shell the ranks get too."""

import argparse
import os
from collections.abc import Sequence

from launch.checkout import checkout

# Variables that ranks inherit from the shell of the launcher: names, and with a "_" at the end, beginnings of names. docs/clusters.md has
# the same list. OMPI_MCA_ and not OMPI_: mpirun sets the others, such as ranks, which would hold for one process only.
PASSED_ON = (
    *("NCCL_", "GLOO_", "FI_", "OFI_NCCL_", "EFA_", "RDMAV_", "UCX_", "UCC_", "OMPI_MCA_", "IBV_", "MLX5_"),  # the network
    *("CUDA_", "CUBLAS_", "CUBLASLT_", "CUDNN_", "NVIDIA_TF32_OVERRIDE", "DALI_"),  # the GPU
    *("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_", "DS_"),
    *("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_"),  # threads and instructions of CPUs
    *("PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "RAY_TRAIN_", "PROTOSHARD_"),
)
SAME_MACHINES = ("LD_LIBRARY_PATH", "CC", "CXX")  # only to hosts of --hosts, which have the same checkout and so the same libraries
OF_THIS_MACHINE = ("CUDA_VISIBLE_DEVICES",)  # which GPUs a rank gets is for Ray to say
DEFAULTS = {  # that keep Ray quick and readable. rayjob.yaml has them too
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # of train loops that report to Ray
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise every line comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # needs train loops that report to Ray
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}


def passed_on(options: argparse.Namespace) -> dict[str, str]:
    """Variables of this shell that the ranks get too, and DEFAULTS."""
    known = (*PASSED_ON, *(SAME_MACHINES if options.address is None else ()), "PYTHONPATH")
    variables = DEFAULTS | {name: value for name, value in os.environ.items() if travels(name, known)} | chosen_variables(options.env)
    chosen = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([*map(os.path.abspath, chosen), checkout(options)])  # a job starts in another folder
    return variables | {"PYTHONPATH": path}


def travels(name: str, known: Sequence[str]) -> bool:
    return name not in OF_THIS_MACHINE and any(name.startswith(entry) if entry.endswith("_") else name == entry for entry in known)


def chosen_variables(settings: Sequence[str]) -> dict[str, str]:
    """Of --env. ValueError: a variable that this shell has not, or one that must differ from host to host."""
    variables = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name:
            raise ValueError(f"--env {setting} names no variable; give --env NAME or --env NAME=VALUE.")
        if name in OF_THIS_MACHINE:
            raise ValueError(f"--env {name}: Ray gives each rank its GPUs; limit a host with slots=N, or --ranks-per-node.")
        if not equals and name not in os.environ:
            raise ValueError(f"--env {name}: this shell has no such variable; export it, or give --env {name}=VALUE.")
        variables[name] = value if equals else os.environ[name]
    return variables
