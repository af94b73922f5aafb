"""What logs of failed servers are taken for. All are cut from logs of vLLM 0.32 on a CPU, or are words from its source,
torch's or the hub's client where the cause needs a GPU or a network."""

import pytest

from sweep.serving.causes import CAUSES, PORT_TAKEN, cause_of, names_extras

NOTHING_WRONG = """\
(APIServer pid=1) INFO 11-23 03:33:46 [api_utils.py:286] non-default args: {'model': '/m', 'trust_remote_code': True}
(APIServer pid=1) INFO 11-23 03:33:46 [model.py:733] Resolved architecture: Qwen2ForCausalLM
(APIServer pid=1) INFO 11-23 03:33:46 [model.py:2152] Using max model len 8192
(EngineCore pid=2) WARNING 11-23 03:33:50 [parallel.py:746] Address already in use. Retrying with a new port.
(EngineCore pid=2) INFO 11-23 03:33:51 [gpu_worker.py:748] Initial free memory: 70.1 GiB; Requested memory: 0.9 (util)
WARNING 11-23 03:33:52 'HTTPSConnectionPool(host='huggingface.co', port=443): Read timed out.' retrying
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""
"""Around a cause, and no cause: what a healthy start says, and what every failed one ends with."""

OUT_OF_MEMORY = (
    "out of memory while loading or computing: give the model more GPUs (tensor_parallel), a quantized checkpoint, a "
    "smaller max_model_len or max_num_seqs, or see who else uses this GPU"
)
UNGATED = "the hub did not let us in, it is a gated model: accept its terms on its page and set HF_TOKEN (it is "


@pytest.mark.parametrize(
    ("log", "text", "passing"),
    [
        (
            "/usr/bin/python: Error while finding module specification for 'vllm.entrypoints.openai.api_server' "
            "(ModuleNotFoundError: No module named 'vllm')",
            "vLLM is not installed for this Python: install lmsweep[gpu] or lmsweep[cpu] there",
            False,
        ),
        (
            "supervisor: cannot run /opt/v/bin/python: No such file or directory",
            "the server's Python cannot be run on its machine (/opt/v/bin/python: No such file or directory): check "
            "server_python, and that all machines have it",
            False,
        ),
        (
            "huggingface_hub.errors.HfHubHTTPError: Server error '503 Service Unavailable' for url 'https://huggin",
            "the hub did not answer and the model is not on this machine: check the network and `path`; `fetch` brings "
            "what a sweep needs to a machine without a network",
            True,
        ),
        (
            "api_server.py: error: unrecognized arguments: --swap-space 4",
            "vLLM does not know --swap-space 4: look at the model's `server` options",
            False,
        ),
        (
            "api_server.py: error: argument --max-num-seqs: invalid int value: 'a'",
            "vLLM refuses an option: --max-num-seqs: invalid int value: 'a'",
            False,
        ),
        (
            # a compiler's, of kernels that are built at the start
            'attention.cu(33): error: argument of type "const float *" is incompatible with "float *"\n'
            "torch.AcceleratorError: CUDA error: out of memory",
            "out of memory while loading or computing: give the model more GPUs (tensor_parallel), a quantized "
            "checkpoint, a smaller max_model_len or max_num_seqs, or see who else uses this GPU",
            False,
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n  Value error, Total "
            "number of attention heads (2) must be divisible by tensor parallel size (5). [type=value_error, input_v",
            "vLLM refuses the configuration: Total number of attention heads (2) must be divisible by tensor parallel "
            "size (5)",
            False,
        ),
        (
            "OSError: [Errno 28] No space left on device",
            "the disk is full (weights, vLLM's caches or /dev/shm): make room on the server's machine",
            False,
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when",
            "no memory is left for the KV cache after the weights: raise gpu_memory_utilization, give the model more "
            "GPUs (tensor_parallel) or take a quantized checkpoint",
            False,
        ),
        (
            "ValueError: To serve at least one request with the model's max seq len (32768), (1.75 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (0.98 GiB). Based on the available memory, the "
            "estimated maximum model length is 18320. Try increasing `gpu_memory_utilization`",
            "the KV cache is too small for max_model_len 32768: lower max_model_len (vLLM estimates that 18320 fits), "
            "raise gpu_memory_utilization (on a CPU VLLM_CPU_KVCACHE_SPACE) or give the model more GPUs",
            False,
        ),
        (
            "(1.75 GiB KV cache is needed, which is larger than the available KV cache memory (0.01 GiB). Try",
            "the KV cache is too small for one request of max_model_len tokens: lower max_model_len, raise "
            "gpu_memory_utilization (on a CPU VLLM_CPU_KVCACHE_SPACE) or give the model more GPUs",
            False,
        ),
        (
            "ValueError: Free memory on device cuda:0 (12.34/79.25 GiB) on startup is less than desired GPU memory "
            "utilization (0.92, 72.91 GiB). Decrease GPU memory utilization or reduce GPU memory used by other",
            "too much GPU memory is already taken by others (12.34 GiB free, 72.91 GiB wanted by "
            "gpu_memory_utilization 0.92): free it, or lower gpu_memory_utilization",
            True,
        ),
        (
            "ValueError: Available memory on node 0 (10.5/23.4 GiB) on startup is less than desired CPU memory "
            "utilization (0.99, 23.17 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls",
            "too much CPU memory is already taken by others (10.5 GiB free, 23.17 GiB wanted by "
            "gpu_memory_utilization 0.99): free it, or lower gpu_memory_utilization",
            True,
        ),
        (
            "AssertionError: Error in memory profiling. Initial free memory 60.1 GiB, current free memory 70.2 GiB.",
            "another process gave GPU memory back while vLLM measured what there is: give its servers GPUs of their "
            "own",
            True,
        ),
        (
            "ERROR [gpu_model_runner.py:5146] Failed to load model - not enough GPU memory. Try lowering "
            "--gpu-memory-utilization (original error: CUDA out of memory. Tried to allocate 2.00 GiB.)",
            OUT_OF_MEMORY,
            False,
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
            "79.25 GiB of which 1.10 GiB is free.",
            OUT_OF_MEMORY,
            False,
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:129] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)",
            OUT_OF_MEMORY,
            False,
        ),
        (
            "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1)\n\nCannot access gated repo "
            "for url https://huggingface.co/org/m/resolve/main/config.json.",
            f"{UNGATED}not set here)",
            False,
        ),
        (
            "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/m",
            f"{UNGATED}not set here)",
            False,
        ),
        (
            "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the "
            "specified revision on the local disk and outgoing traffic has been disabled.",
            "the model is not on this machine, and HF_HUB_OFFLINE keeps vLLM from asking the hub: check `path` and "
            "`revision`; `fetch` brings what a sweep needs to a machine without a network",
            False,
        ),
        (
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
            "'namespace/repo_name': '/nonexistent/folder'. Use `repo_type` argument if needed.",
            "there is no such model, no folder /nonexistent/folder on the server's machine: check `path`, and that all "
            "machines see it",
            False,
        ),
        (
            "  Value error, Invalid repository ID or local directory specified: '/m/noconf'.\nPlease verify the "
            "following requirements:",
            "/m/noconf holds no config.json that vLLM understands: check `path`, and that the checkpoint is complete",
            False,
        ),
        (
            "huggingface_hub.errors.RevisionNotFoundError: 404 Client Error. (Request ID: Root=1)\n\nRevision Not",
            "the hub's repository has no such revision: check `revision`",
            False,
        ),
        (
            "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1)",
            "there is no such model on the hub, or it is a private one: check `path`, and set HF_TOKEN for a private "
            "one (the token is not set here)",
            False,
        ),
        (
            "huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the file on the "
            "Hub and we cannot find the requested files in the local cache.\n\nOSError: We couldn't connect to "
            "'https://huggingface.co' to load the files, and couldn't find them in the cached files.",
            "the hub did not answer and the model is not on this machine: check the network and `path`; `fetch` brings "
            "what a sweep needs to a machine without a network",
            True,
        ),
        (
            "(Worker pid=3) ERROR [executor.py:953] httpx.ConnectTimeout: timed out",
            "the hub did not answer and the model is not on this machine: check the network and `path`; `fetch` brings "
            "what a sweep needs to a machine without a network",
            True,
        ),
        (
            "huggingface_hub.errors.HfHubHTTPError: 503 Server Error: Service Temporarily Unavailable for url: x",
            "the hub did not answer and the model is not on this machine: check the network and `path`; `fetch` brings "
            "what a sweep needs to a machine without a network",
            True,
        ),
        (
            "  Value error, User-specified max_model_len (100000) is greater than the derived max_model_len "
            "(max_position_embeddings=8192.0 or model_max_length=None in model's config.json). To allow overriding",
            "max_model_len 100000 is more than the checkpoint was made for (max_position_embeddings=8192.0): lower it",
            False,
        ),
        (
            "  Value error, Quantization method specified in the model config (awq) does not match the quantization "
            "method specified in the `quantization` argument (gptq). [type=value_error, input_value=ArgsKwargs((), "
            "{'model': ...nderer_num_workers': 1}), input_type=ArgsKwargs]",
            "the checkpoint is quantized with awq, the configuration says gptq: leave `quantization` unset",
            False,
        ),
        (
            "  Value error, Cannot find the config file for awq [type=value_error, input_value=ArgsKwargs(())]",
            "the checkpoint is not quantized with awq: leave `quantization` unset or take the quantized checkpoint",
            False,
        ),
        (
            "  Value error, Unknown quantization method: nosuch. Must be one of ['awq', 'auto_awq', 'fp8'].",
            "vLLM cannot use this quantization here (nosuch): take another checkpoint or leave `quantization` unset",
            False,
        ),
        (
            "ValueError: fp8 quantization is currently not supported in cpu.",
            "vLLM cannot use this quantization here (fp8): take another checkpoint or leave `quantization` unset",
            False,
        ),
        (
            "ValueError: The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. "
            "Current capability: 75.",
            "this GPU is too old for the checkpoint's quantization fp8: take another checkpoint, or a GPU of compute "
            "capability 8.9",
            False,
        ),
        (
            "RuntimeError: Quantization scheme is not supported for the current GPU. Min capability: 100. Current "
            "capability: 75.",
            "this GPU is too old for the checkpoint's quantization: take another checkpoint, or a GPU of compute "
            "capability 10.0",
            False,
        ),
        (
            "ValueError: torch.bfloat16 is not supported for quantization method gptq. Supported dtypes: "
            "[torch.float16]",
            "the quantization gptq does not work in bfloat16: set `dtype` to one of torch.float16",
            False,
        ),
        (
            "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU "
            "has compute capability 7.5.",
            "this GPU has no bfloat16: set `dtype: half`",
            False,
        ),
        (
            "ValueError: The model type 'gemma2' does not support float16. Reason: Numerical instability.",
            "gemma2 is not served in float16: leave `dtype` unset",
            False,
        ),
        (
            "  Value error, The repository /m/remote contains custom code which must be executed to correctly load the "
            "model.\nPlease pass the argument `trust_remote_code=True` to allow custom code to be run.",
            "the checkpoint brings its own code: `trust_remote_code: true` runs it",
            False,
        ),
        (
            "RuntimeError: Failed to load the model config. If the model is a custom model not yet available in the "
            "HuggingFace transformers library, consider setting `trust_remote_code=True` in LLM or using the",
            "the checkpoint brings its own code: `trust_remote_code: true` runs it",
            False,
        ),
        (
            "  Value error, Model architectures ['FooForCausalLM'] are not supported for now. Supported architectures: "
            "dict_keys(['AfmoeForCausalLM'])",
            "vLLM cannot serve this architecture (['FooForCausalLM']): see vLLM's list of supported models, or a newer "
            "version",
            False,
        ),
        (
            "  Value error, The checkpoint you are trying to load has model type `foo9` but Transformers does not "
            "recognize this architecture. This could be because of an issue with the checkpoint",
            "vLLM cannot serve this architecture (foo9): see vLLM's list of supported models, or a newer version",
            False,
        ),
        (
            "(Worker pid=3) ERROR 11-23 03:51:03 [multiproc_executor.py:953] "
            "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, "
            "file not fully covered",
            "a weight file is damaged or was not written to its end (Error while deserializing header: incomplete "
            "metadata, file not fully covered): fetch or copy the checkpoint again",
            False,
        ),
        (
            "(Worker pid=3) ERROR [executor.py:953] RuntimeError: Cannot find any model weights with `/m/empty`",
            "there are no weights in /m/empty: check `path`, and `load_format` if they are of another kind",
            False,
        ),
        ("OSError: [Errno 98] Address already in use", PORT_TAKEN, True),
    ],
)
def test_a_log_is_told_in_one_line_with_the_cure(
    log: str, text: str, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = cause_of(f"{NOTHING_WRONG}{log}\n{NOTHING_WRONG}")
    assert found is not None
    assert (found.text, found.passing) == (text, passing)
    assert "\n" not in found.text


@pytest.mark.parametrize("log", ["", NOTHING_WRONG, "Traceback (most recent call last):\nKeyError: 'x'"])
def test_an_unknown_cause_is_not_guessed(log: str) -> None:
    assert cause_of(log) is None


def test_a_gated_model_says_whether_there_is_a_token_and_not_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    found = cause_of("Cannot access gated repo for url https://huggingface.co/org/m")
    assert found is not None
    assert found.text == f"{UNGATED}set here)"


def test_every_cause_is_one_line() -> None:
    assert all("\n" not in text for _, text, _ in CAUSES)


@pytest.mark.parametrize(
    ("log", "named"),
    [
        ("RuntimeError: Failed to load 0th LogitsProcessor plugin sweep.serving.forced_decoding:ForcedDecoding", True),
        ("api_server: error: unrecognized arguments: --enable-scale-out", True),
        ("ValueError: custom logits_processors are not supported here", True),
        ("ModuleNotFoundError: No module named 'sweep.serving.vllm_plugin'", True),
        ("INFO non-default args: {'logits_processors': ['sweep.serving.forced_decoding:ForcedDecoding']}", False),
        ("ValueError: No available memory for the cache blocks", False),
    ],
)
def test_a_failure_over_an_option_of_ours_is_told_from_others(log: str, named: bool) -> None:
    assert names_extras(f"{NOTHING_WRONG}{log}\n{NOTHING_WRONG}") is named
