"""What must not be shown, and how it is hidden.

Names and URLs tell a secret. The texts of one sweep that must not be shown are gathered by `planning/loading.py`; a
stream of bytes is masked by `serving/supervisor.py`, which may import nothing.
"""

import re
from collections.abc import Iterable, Mapping
from functools import reduce

MASK = "***"

SECRET_LEAST = 8
"""Characters. Shorter texts are no real keys, and would be found in innocent text: a `1` in every second setting."""

# The end of the name decides: `HF_TOKEN` and `api-key` are secret, `max_tokens` and `eos_token` are not. Variables of
# the environment, in capitals, are called more freely: `OPENAI_KEY`, `GITHUB_PAT`, `HF_TOKEN_READ`, `API_KEY_2`.
_PLAIN = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "start", "end", "image", "video", "audio", "implicit")
_SECRET = re.compile(
    rf"((api|access|secret|private)[_-]?key|secret|{''.join(f'(?<!{word}_)' for word in _PLAIN)}token"
    r"|passw(or)?d|passphrase|credentials?|authorization|connection_string)$"
    r"|(?-i:_(KEY|PAT|PASS|PWD|AUTH)$|(TOKEN|API_?KEY|SECRET)_(?!(PATH|TYPE|FILE|DIR|URL|NAME)$)[A-Z0-9]{1,8}$)",
    re.IGNORECASE,
)

_PASSWORD = re.compile(r"://[^\s/@:]*:([^\s/@]+)@")


def is_secret(name: str) -> bool:
    """Whether a key or environment variable of this name holds what must not be shown: `HF_TOKEN`, not `eos_token`."""
    return _SECRET.search(name) is not None


def passwords(text: str) -> list[str]:
    """Those of the URLs in a text: `b` of `https://a:b@host`."""
    return _PASSWORD.findall(text)


def secret_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that must not be shown, by their name or for a URL with a password in it."""
    return {name: value for name, value in environment.items() if is_secret(name) or passwords(value)}


def is_proxy(name: str) -> bool:
    """`HTTPS_PROXY` and its like: who needs the network needs them, with the password that they may hold."""
    return name.lower().endswith("_proxy")


def masked(text: str, secrets: Iterable[str]) -> str:
    """`text` with every secret in it replaced by `***`."""
    return reduce(lambda shown, secret: shown.replace(secret, MASK), secrets, text)
