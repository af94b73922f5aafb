"""vLLM's own parser, asked about options before any server starts. Run as a script by the Python that serves.

That Python may hold nothing of ours, so the standard library and vLLM are all that is imported here. The answer is JSON
on stdout; vLLM's messages go to stderr.

    python vllm_parser.py installed                 which vLLM would be imported; takes 50 ms, as vLLM is not imported
    python vllm_parser.py check < command-lines     what its parser says to them; takes some 15 s on two cores

`command-lines` is a list with a list of options for each server, an option being its key (ours, handed back), its flag
and its arguments on the command line.
"""

import importlib
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

PARSERS = ("entrypoints/launchers/cli_args.py", "entrypoints/common/cli_args.py", "entrypoints/openai/cli_args.py")
"""Where vLLM 0.32, 0.33 and older versions keep `make_arg_parser`."""

DEFINITIONS = ("_version.py", "engine/arg_utils.py", "envs.py", *PARSERS)
"""Files of vLLM whose change means other options."""

PLUGINS = ("vllm.general_plugins", "vllm.platform_plugins")
"""Entry points by which other packages add quantizations."""

UNNUMBERED = "dev"
"""What vLLM itself calls a build that does not know its version."""

Option = tuple[str, str, list[str]]
Mistake = tuple[str, str | None]
"""An option's key, empty for all of them together, and the parser's words, None for an option that it does not have."""


class Refused(Exception):
    """The parser's words, where argparse would have ended the process."""


def main() -> None:
    # The folder of this script comes first otherwise, and its modules would hide others of the same name.
    del sys.path[0]
    answer = os.dup(1)
    os.dup2(2, 1)
    reply = installed() if sys.argv[1] == "installed" else check(answer)
    with os.fdopen(answer, "w") as pipe:
        json.dump(reply, pipe)


def installed() -> dict[str, Any]:
    """`version` of the vLLM that would be imported, None without one, and `stamp`, which changes with its options."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return {"version": None, "stamp": []}
    folder = Path(spec.origin).parent
    try:
        version = str(runpy.run_path(str(folder / "_version.py"))["__version__"])
    except (OSError, KeyError):
        version = UNNUMBERED
    files = [(name, (folder / name).stat()) for name in DEFINITIONS if (folder / name).is_file()]
    stamp = [sys.version, str(folder), *([name, stat.st_mtime_ns, stat.st_size] for name, stat in files)]
    return {"version": version, "stamp": stamp}


def check(answer: int) -> dict[str, Any]:
    """`options`, `variables` and `quantizations` that this vLLM has, and `mistakes`, a list for each server.

    All are None where its parser is kept at a place that we do not know. `answer` is where stdout went.
    """
    import vllm.envs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if not current_platform.device_type and "VLLM_TARGET_DEVICE" not in os.environ:
        # A GPU build on a machine without a GPU, a login node, cannot put its parser together ("Failed to infer device
        # type") unless it is told so. The options are the same.
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
        os.dup2(answer, 1)
        os.execv(sys.executable, sys.orig_argv)

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise Refused(message)

        def exit(self, status: int = 0, message: str | None = None) -> NoReturn:  # noqa: ARG002 (argparse's signature)
            raise Refused("it ends the server")

    folder = Path(vllm.envs.__file__).parent
    place = next((name for name in PARSERS if (folder / name).is_file()), None)
    if place is None:
        return {"options": None, "variables": None, "quantizations": None, "mistakes": None}
    module = importlib.import_module(f"vllm.{place.removesuffix('.py').replace('/', '.')}")
    parser = module.make_arg_parser(Parser())
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    servers = json.load(sys.stdin)
    asked = {args[-1].lower() for options in servers for _, flag, args in options if flag == "--quantization" and args}
    return {
        "options": sorted(flags),
        "variables": sorted(vllm.envs.environment_variables),
        "quantizations": quantizations(asked),
        "mistakes": [mistakes(parser, flags, module.validate_parsed_serve_args, options) for options in servers],
    }


def quantizations(asked: set[str]) -> list[str] | None:
    """What `--quantization` takes, in lower case as vLLM reads it, or None where only a start would tell.

    Beside the methods that it lists vLLM takes names for one or another checkpoint (`marlin`), so one of `asked` that
    its sources hold counts too. Where other packages may add names (on a GPU only, say) any name may be one.
    """
    if any(not point.value.startswith("vllm.") for group in PLUGINS for point in entry_points(group=group)):
        return None
    try:
        methods = importlib.import_module("vllm.model_executor.layers.quantization")
        known = set(methods.QUANTIZATION_METHODS)
        sources = list(Path(str(methods.__file__)).parent.rglob("*.py")) if asked - known else []
        text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    except Exception as error:  # noqa: BLE001 (a server of it will say more)
        sys.stderr.write(f"its quantizations cannot be listed: {error!r}\n")
        return None
    return sorted(known | {name for name in asked if f'"{name}"' in text or f"'{name}'" in text})


def mistakes(parser: Any, flags: set[str], validate: Callable[[Any], None], options: list[Option]) -> list[Mistake]:
    """Of one server: of each option alone, and if there are none, of all together."""
    found: list[Mistake] = []
    for key, flag, arguments in options:
        # By name first: argparse takes the beginning of an option's name for the option.
        if flag.partition(".")[0] not in flags:
            found.append((key, None))
        elif words := objection(partial(alone, parser, arguments)):
            found.append((key, words))
    everything = [argument for _, _, arguments in options for argument in arguments]
    if not found and (words := objection(lambda: validate(parser.parse_args(everything)))):
        found.append(("", words))
    return found


def alone(parser: Any, arguments: list[str]) -> None:
    """Parse one option. A value that it does not take would become the model to serve, which is no mistake to vLLM."""
    if parser.parse_args(arguments).model_tag is not None:
        raise Refused("it is a switch and takes no value but true and false")


def objection(attempt: Callable[[], object]) -> str | None:
    """What vLLM says against it."""
    try:
        attempt()
    except Exception as error:  # noqa: BLE001 (whatever its parser raises would end a server)
        return str(error) or type(error).__name__
    return None


if __name__ == "__main__":
    main()
