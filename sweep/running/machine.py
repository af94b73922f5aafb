"""What this machine carries, found without Ray: a launch that cannot work says so at once."""

import itertools
import os
import re
import secrets
import subprocess

import psutil

from sweep.planning.config import RayConfig
from sweep.running.inventory import Node

CPU_SERVER = "lmsweep_cpu_server"
EVALUATOR = "lmsweep_evaluator"
"""Custom resources of a local cluster: slots, since a CPU server or an evaluator is no whole number of cores."""

CPU_SERVER_GB = 4.5
"""Memory of one CPU server of a tiny model (3.4 GB measured) and room for its KV cache."""

CPU_SERVERS_MOST = 4

EVALUATOR_GB = 1.0
"""0.65 GB measured after a first cell, plus documents and requests."""


def local_gpus() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves, found without any GPU library."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    present = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    # CUDA reads the list up to the first entry that is no device; -1 and NoDevFiles are how people hide all of them.
    entries = (entry.strip() for entry in visible.split(","))
    seen = itertools.takewhile(lambda entry: re.match(r"\d|GPU-|MIG-", entry), entries)
    return min(present, len(list(seen)))


def starts_local(config: RayConfig) -> bool:
    """Whether this launch brings up a cluster of its own."""
    return config.address == "local" or (config.address is None and not os.environ.get("RAY_ADDRESS"))


def local_node(config: RayConfig) -> Node:
    """What this machine carries: measured needs of a CPU server and an evaluator against its memory and cores."""
    gpus, cores = local_gpus(), len(os.sched_getaffinity(0))
    memory_gb = psutil.virtual_memory().available / 2**30
    by_memory = int(memory_gb * 0.75 / CPU_SERVER_GB)
    cpu_servers = config.cpu_servers or max(1, min(CPU_SERVERS_MOST, cores, by_memory))
    servers = gpus or cpu_servers
    evaluators = config.evaluators or max(1, min(2 * servers, cores, int(memory_gb * 0.25 / EVALUATOR_GB)))
    return Node(name="this machine", gpus=gpus, cpu_servers=cpu_servers, evaluators=evaluators)


def prepare_local_ray() -> None:
    """Set what a local cluster reads from the environment; must come before `import ray`, which keeps what it finds."""
    # Since 2.59 a local cluster wants a token and would write the user's own ~/.ray/auth_token, which changes how
    # their next `ray start` behaves. A token of this launch in the environment does neither.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors without GPUs keep CUDA_VISIBLE_DEVICES as it is: what our children see is set for each of them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # When the head of a cluster of our own is gone, all of it is. Ray, and the driver with it, would wait a minute for
    # its return.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    # Ray's default of 15 would be inherited by servers, which then lose every core to whatever else runs.
    os.environ.setdefault("RAY_worker_niceness", "0")
