"""What this machine carries, found without Ray: a launch that cannot work says so at once."""

import itertools
import os
import re
import secrets
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from sweep.errors import ConfigError, ResourceError
from sweep.planning.config import RayConfig
from sweep.planning.plan import ServerPlan
from sweep.running.inventory import Node, require

CPU_SERVER = "lmsweep_cpu_server"
EVALUATOR = "lmsweep_evaluator"
"""Custom resources of a local cluster: slots, since a CPU server or an evaluator is no whole number of cores."""

CPU_SERVER_GB = 4.5
"""Memory of one CPU server of a tiny model (3.4 GB measured) and room for its KV cache."""

CPU_SERVERS_MOST = 4

EVALUATOR_GB = 1.0
"""0.65 GB measured after a first cell, plus documents and requests."""

REACH_S = 5.0
"""A head is asked for a sign of life for so long; Ray itself tries a wrong address for a quarter of an hour."""


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


def ray_address(config: RayConfig) -> str:
    """`local`, `auto` or `host:port`; `auto` and nothing said mean RAY_ADDRESS where it is set, as in Ray itself.

    Raises ConfigError for anything else.
    """
    variable = os.environ.get("RAY_ADDRESS", "").strip()
    from_variable = variable != "" and config.address in (None, "auto")
    name, address = ("RAY_ADDRESS", variable) if from_variable else ("ray.address", config.address or "local")
    if address in ("auto", "local"):
        return address
    if address.startswith("ray://"):
        raise ConfigError(
            f"{name}: {address} is an address of Ray Client, and a sweep would die with the connection to it: start it "
            "on the head with ray.address=auto, or submit it as a job (deploy/job-submit.sh)"
        )
    if "://" in address:
        raise ConfigError(
            f"{name}: {address} is where jobs are submitted (deploy/job-submit.sh); a sweep that joins a cluster wants "
            "the host:port of its head, as `ray start --head` prints it"
        )
    host, colon, port = address.rpartition(":")
    if not re.fullmatch(r"[^\s:/@\[\]]+|\[[0-9a-fA-F:.]+\]", host) or not port.isdecimal() or not 0 < int(port) < 65536:
        guess = f"; did you mean {address + ':6379'!r}?" if re.fullmatch(r"[\w.-]+", address) and not colon else ""
        raise ConfigError(f"{name}: wants auto, local or host:port, got {address!r}{guess}")
    return address


def starts_local(config: RayConfig) -> bool:
    """Whether this launch brings up a cluster of its own. Raises ConfigError as `ray_address`."""
    return ray_address(config) == "local"


def local_node(config: RayConfig) -> Node:
    """What this machine carries: measured needs of a CPU server and an evaluator against its memory and cores."""
    gpus, cores = local_gpus(), len(os.sched_getaffinity(0))
    memory_gb = psutil.virtual_memory().available / 2**30
    by_memory = int(memory_gb * 0.75 / CPU_SERVER_GB)
    cpu_servers = config.cpu_servers or max(1, min(CPU_SERVERS_MOST, cores, by_memory))
    servers = gpus or cpu_servers
    evaluators = config.evaluators or max(1, min(2 * servers, cores, int(memory_gb * 0.25 / EVALUATOR_GB)))
    return Node(name="this machine", gpus=gpus, cpu_servers=cpu_servers, evaluators=evaluators)


def require_head(address: str) -> None:
    """Raise ResourceError unless a head of Ray may be listening at `host:port`; `auto` is left to Ray, which finds none
    at once."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    cure = "start Ray there (`ray start --head`), or correct ray.address or RAY_ADDRESS"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S) as connection:
            # Its first words are those of HTTP/2, which gRPC speaks: a frame of settings (type 4) is the answer.
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
            heard = b"" if os.environ.get("RAY_USE_TLS") == "1" else connection.recv(9, socket.MSG_WAITALL)
    except TimeoutError:
        raise ResourceError(f"Ray at {address} does not answer within {REACH_S:g} s; {cure}") from None
    except ConnectionRefusedError:
        raise ResourceError(f"nothing listens at {address}; {cure}") from None
    except OSError as error:
        raise ResourceError(f"Ray at {address} cannot be reached: {error}; {cure}") from None
    if os.environ.get("RAY_USE_TLS") != "1" and heard[3:4] != b"\x04":
        raise ResourceError(
            f"what listens at {address} is no head of Ray: its port is the one that `ray start --head` was given, 6379 "
            "without (8265 is its dashboard)"
        )


def require_kept(path: Path) -> None:
    """Raise ConfigError for a run directory in the copy of the working directory that Ray makes for a job: it is
    deleted after the job, and a job with other files has another."""
    if any(pair == ("runtime_resources", "working_dir_files") for pair in itertools.pairwise(path.parts)):
        raise ConfigError(
            f"runs_dir: {path} lies in the temporary copy that Ray has made of the job's working_dir, and would be "
            "lost with it; give an absolute folder that all nodes see: runs_dir=/shared/runs"
        )


def prepare_ray(config: RayConfig, servers: Mapping[str, ServerPlan]) -> None:
    """Refuse what can be refused without Ray: servers that do not fit on this machine where it is the cluster, a head
    that is not there. Then set what Ray reads from the environment, for which it must come before `import ray`.

    Raises ResourceError.
    """
    if starts_local(config):
        require(servers, [local_node(config)])
        prepare_local_ray()
    else:
        require_head(ray_address(config))
        prepare_joined_ray()


def prepare_joined_ray() -> None:
    """Ray's own search for the head of a cluster, which may be gone by now, ends within a minute."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "2")  # tries, of some 15 s each
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", "5")


def prepare_local_ray() -> None:
    """What a local cluster reads from the environment."""
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
