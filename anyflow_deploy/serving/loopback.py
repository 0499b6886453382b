"""Tell which addresses only this machine can reach."""

from __future__ import annotations

import ipaddress


def is_local(host: str) -> bool:
    """Return whether a name or address is this machine's own, whatever a resolver says."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
