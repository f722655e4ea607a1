"""What keeps tenants apart in caches: a salt of each, which vLLM mixes into the hash of a prompt's first block, and so
into all that follow. Device, host buffer and router find KV by these hashes, so none of them finds another tenant's.
"""

import hashlib
import json


def tenant_salt(tenant: str, own: str | None) -> str:
    """The ``cache_salt`` of a tenant's request. ``own``: what the request has asked for; it divides the tenant's own
    cache further, and leads to no other tenant's."""
    return hashlib.sha256(json.dumps([tenant, own]).encode()).hexdigest()
