"""The commands' side of the API: the key and the authorities that requests to a cluster go with.

ELLM_API_KEY         the key
ELLM_API_KEY_FILE    or a file that has it
SSL_CERT_FILE        authorities that certificates are checked against, in place of the usual ones
"""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx

KEY_VARIABLE, KEY_FILE_VARIABLE = "ELLM_API_KEY", "ELLM_API_KEY_FILE"
_AUTHORITIES_VARIABLE = "SSL_CERT_FILE"


class CredentialsError(Exception):
    """What the environment names cannot be used; the message says which variable."""


def known_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that the environment has. Raises CredentialsError."""
    if key := environment.get(KEY_VARIABLE):
        return key
    if not (name := environment.get(KEY_FILE_VARIABLE)):
        return None
    try:
        key = Path(name).expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialsError(
            f"cannot read the API key in {name}, which {KEY_FILE_VARIABLE} names: {error}"
        ) from error
    if not key:
        raise CredentialsError(f"{name}, which {KEY_FILE_VARIABLE} names, is empty: it should hold an API key")
    return key


def api_client(timeout_s: float, key: str | None = None, certfile: str | None = None) -> httpx.Client:
    """A client that shows a key, where one is known.

    Args:
        key: in place of the environment's.
        certfile: of the server itself: no other is taken, and its name is not looked at.

    Raises CredentialsError.
    """
    key = key or known_key()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(headers=headers, timeout=timeout_s, trust_env=False, verify=_trust(certfile))


def _trust(certfile: str | None) -> ssl.SSLContext:
    authorities = certfile or os.environ.get(_AUTHORITIES_VARIABLE)
    try:
        context = ssl.create_default_context(cafile=authorities)
    except OSError as error:
        where = certfile or f"{authorities}, which {_AUTHORITIES_VARIABLE} names"
        raise CredentialsError(f"no certificates in {where}: {error}") from error
    if certfile is not None:
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
