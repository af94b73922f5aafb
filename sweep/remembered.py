"""What takes seconds to find out, kept in the user's cache folder; without it, it is found out again."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

_T = TypeVar("_T")


def place(kind: str, *parts: bytes) -> Path:
    """The file for the answer to a question of this kind, told from others by `parts`."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lmsweep", kind)
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    return folder / f"{digest}.msgpack"


def recall(path: Path, kind: type[_T]) -> _T | None:
    """What `keep` wrote; None where there is nothing, or nothing of this kind."""
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    return None


def keep(path: Path, answer: object) -> None:
    """For the next `recall`. A folder that cannot be written costs only the time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(msgspec.msgpack.encode(answer))
        temporary.replace(path)
