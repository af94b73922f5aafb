"""What a vLLM server's log tells about its end: the well-known causes, each in one line with the cure.

The patterns are the words of vLLM 0.32 and 0.33, torch, transformers and huggingface_hub; tests hold real logs.
"""

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cause:
    text: str
    """One line, with the cure."""
    passing: bool
    """Whether another start may succeed with nothing changed."""


PORT_TAKEN = "its port was taken by another program"

FETCH = "`fetch` brings what a sweep needs to a machine without a network"

CAUSES: tuple[tuple[str, str, bool], ...] = (
    (
        r"No module named '?vllm'?(?![.\w])",
        "vLLM is not installed for this Python: install lmsweep[gpu] or lmsweep[cpu] there",
        False,
    ),
    (
        # With the program's name before it: compilers too have errors about arguments.
        r"\.py: error: unrecognized arguments: (?P<a>[^\n]+)",
        "vLLM does not know {a}: look at the model's `server` options",
        False,
    ),
    (r"\.py: error: argument (?P<a>-[^\n]+)", "vLLM refuses an option: {a}", False),
    (
        r"supervisor: cannot run (?P<a>[^\n]+)",
        "the server's Python cannot be run on its machine ({a}): check server_python, and that all machines have it",
        False,
    ),
    # Memory. Before all that a process reports which lost the one that ran out of it.
    (
        r"No available memory for the cache blocks",
        "no memory is left for the KV cache after the weights: raise gpu_memory_utilization, give the model more GPUs "
        "(tensor_parallel) or take a quantized checkpoint",
        False,
    ),
    (
        r"max seq len \((?P<a>\d+)\)[^\n]*larger than the available KV cache memory"
        r"[^\n]*estimated maximum model length is (?P<b>\d+)",
        "the KV cache is too small for max_model_len {a}: lower max_model_len (vLLM estimates that {b} fits), raise "
        "gpu_memory_utilization (on a CPU VLLM_CPU_KVCACHE_SPACE) or give the model more GPUs",
        False,
    ),
    (
        r"larger than the available KV cache memory|Cannot auto-fit max_model_len",
        "the KV cache is too small for one request of max_model_len tokens: lower max_model_len, raise "
        "gpu_memory_utilization (on a CPU VLLM_CPU_KVCACHE_SPACE) or give the model more GPUs",
        False,
    ),
    (
        r"\((?P<a>[\d.]+)/[\d.]+ GiB\) on startup is less than desired (?P<b>GPU|CPU) memory utilization"
        r" \((?P<c>[\d.]+), (?P<d>[\d.]+) GiB\)",
        "too much {b} memory is already taken by others ({a} GiB free, {d} GiB wanted by "
        "gpu_memory_utilization {c}): free it, or lower gpu_memory_utilization",
        True,
    ),
    (
        r"is less than desired (?P<a>GPU|CPU) memory utilization",
        "too much {a} memory is already taken by others: free it, or lower gpu_memory_utilization",
        True,
    ),
    (
        r"Error in memory profiling\. Initial free memory",
        "another process gave GPU memory back while vLLM measured what there is: give its servers GPUs of their own",
        True,
    ),
    (
        r"Failed to load model - not enough GPU memory|(?:CUDA|HIP)(?: error:)? out of memory"
        r"|Triton Error \[(?:CUDA|HIP)\]: out of memory|torch\.OutOfMemoryError"
        r"|torch\.cuda\.OutOfMemoryError|DefaultCPUAllocator: (?:can't|not enough) (?:allocate )?memory",
        "out of memory while loading or computing: give the model more GPUs (tensor_parallel), a quantized "
        "checkpoint, a smaller max_model_len or max_num_seqs, or see who else uses this GPU",
        False,
    ),
    (
        r"on kv cache allocation is less than requested",
        "not enough memory for the KV cache: lower VLLM_CPU_KVCACHE_SPACE",
        False,
    ),
    # The hub.
    (
        r"GatedRepoError|Cannot access gated repo|access a gated repo|is a gated repository",
        "the hub did not let us in, it is a gated model: accept its terms on its page and set HF_TOKEN (it {token})",
        False,
    ),
    (
        r"outgoing traffic has been disabled|OfflineModeIsEnabled|offline mode is enabled",
        "the model is not on this machine, and HF_HUB_OFFLINE keeps vLLM from asking the hub: check `path` and "
        f"`revision`; {FETCH}",
        False,
    ),
    (
        r"Repo id must be in the form[^\n]*?: '(?P<a>[^'\n]+)'",
        "there is no such model, no folder {a} on the server's machine: check `path`, and that all machines see it",
        False,
    ),
    (
        r"Invalid repository ID or local directory specified: '(?P<a>[^'\n]+)'",
        "{a} holds no config.json that vLLM understands: check `path`, and that the checkpoint is complete",
        False,
    ),
    (
        r"RevisionNotFoundError|is not a valid git identifier",
        "the hub's repository has no such revision: check `revision`",
        False,
    ),
    (
        r"RepositoryNotFoundError|is not a local folder and is not a valid model identifier|401 Client Error"
        r"|is not a local folder or a valid repository name",
        "there is no such model on the hub, or it is a private one: check `path`, and set HF_TOKEN for a "
        "private one (the token {token})",
        False,
    ),
    # The checkpoint and what is asked of it.
    (
        r"User-specified max_model_len \((?P<a>\d+)\) is greater than the derived max_model_len \((?P<b>[^\s)]+)",
        "max_model_len {a} is more than the checkpoint was made for ({b}): lower it",
        False,
    ),
    (
        r"model config \((?P<a>\S+)\) does not match the quantization method specified "
        r"in the `quantization` argument \((?P<b>[^\s()]+)\)",
        "the checkpoint is quantized with {a}, the configuration says {b}: leave `quantization` unset",
        False,
    ),
    (
        r"Cannot find the config file for (?P<a>\w+)",
        "the checkpoint is not quantized with {a}: leave `quantization` unset or take the quantized checkpoint",
        False,
    ),
    (
        r"Unknown quantization method: (?P<a>[^\s.]+)|(?P<b>\S+) quantization is currently not supported",
        "vLLM cannot use this quantization here ({a}{b}): take another checkpoint or leave `quantization` unset",
        False,
    ),
    (
        r"[Qq]uantization (?:method|scheme)(?P<a> \S+)? is not supported for the current GPU\. Min\w* capability: "
        r"(?P<b>\d+)(?P<c>\d)\b",
        "this GPU is too old for the checkpoint's quantization{a}: take another checkpoint, or a GPU of compute "
        "capability {b}.{c}",
        False,
    ),
    (
        r"torch\.(?P<a>\w+) is not supported for quantization method (?P<b>\S+)\. Supported dtypes: "
        r"\[(?P<c>[^\]\n]*)\]",
        "the quantization {b} does not work in {a}: set `dtype` to one of {c}",
        False,
    ),
    (r"Bfloat16 is only supported on GPUs", "this GPU has no bfloat16: set `dtype: half`", False),
    (
        r"The model type '(?P<a>[^'\n]+)' does not support (?P<b>\w+)",
        "{a} is not served in {b}: leave `dtype` unset",
        False,
    ),
    (
        # Not the option's echo in the line of settings that every start prints.
        r"(?:set|pass|setting) (?:the )?(?:option|argument)?[^\n]{0,20}trust_remote_code=True",
        "the checkpoint brings its own code: `trust_remote_code: true` runs it",
        False,
    ),
    (
        r"Model architectures? (?P<a>\[[^\]\n]*\]|\w+) (?:are not supported|failed to be inspected|was supported"
        r"|is not supported)"
        r"|does not recognize this architecture|model type `(?P<b>[^`\n]+)` but Transformers does not recognize",
        "vLLM cannot serve this architecture ({a}{b}): see vLLM's list of supported models, or a newer version",
        False,
    ),
    (
        r"SafetensorError: (?P<a>[^\n]+)|(?P<b>PytorchStreamReader failed[^\n]*|invalid load key[^\n]*)",
        "a weight file is damaged or was not written to its end ({a}{b}): fetch or copy the checkpoint again",
        False,
    ),
    (
        r"Cannot find any model weights with [`'](?P<a>[^`'\n]+)",
        "there are no weights in {a}: check `path`, and `load_format` if they are of another kind",
        False,
    ),
    (
        r"No space left on device",
        "the disk is full (weights, vLLM's caches or /dev/shm): make room on the server's machine",
        False,
    ),
    (
        r"validation errors? for \w*Config\s+(?:[\w.]+\n\s+)?(?:Value error, |Assertion failed, )?(?P<a>[^\n]+?)\.?"
        r"(?: \[type=|\n|$)",
        "vLLM refuses the configuration: {a}",
        False,
    ),
    # After all else, since a log may hold faults of the hub that were got over. As exceptions, for the same reason.
    (
        r"couldn't connect to '|An error happened while trying to locate the file|LocalEntryNotFoundError"
        r"|specific connection error when trying to load"
        r"|HfHubHTTPError: (?:(?:Client|Server) error ')?(?:429|50[0234])\b"
        r"|\b(?:httpx|requests\.exceptions|urllib3\.exceptions)\.\w*(?:Connect|Timeout)\w*: ",
        f"the hub did not answer and the model is not on this machine: check the network and `path`; {FETCH}",
        True,
    ),
    (r"[Aa]ddress already in use(?!\. Retrying)", PORT_TAKEN, True),
)
"""Pattern in a server's log -> the cause with the cure, and whether it may pass. The first match counts: specific
before general."""


def cause_of(log_text: str) -> Cause | None:
    """The well-known cause of a failure that a server's log tells; None for an unknown one.

    Asked on the server's machine: a cause that HF_TOKEN may cure says whether that is set here.
    """
    token = "is set here" if os.environ.get("HF_TOKEN") else "is not set here"
    for pattern, text, passing in CAUSES:
        if found := re.search(pattern, log_text):
            parts = {name: part or "" for name, part in found.groupdict().items()}
            return Cause(text=text.format(**parts, token=token), passing=passing)
    return None


EXTRAS = re.compile(
    r"(?:[Ee]rror|ERROR)\b.*(?:[Ll]ogits[-_]processors|ForcedDecoding|enable[-_](?:scale[-_]out|prompt[-_]tokens)"
    r"|worker[-_]extension[-_]cls|vllm_plugin)"
)
"""A line of a failure that names something we start servers with unasked (engine.Extras)."""


def names_extras(log_text: str) -> bool:
    """Whether it ended because of such an option, which another version of vLLM may not take."""
    return EXTRAS.search(log_text) is not None
