"""Who may send requests, and to which paths: the settings of `auth.py`."""

from __future__ import annotations

from dataclasses import dataclass

OPEN = ("/", "/page.js", "/page.css", "/health")
"""Paths that need no token: they hold no secret, and the page has to load to ask for a token."""


@dataclass(frozen=True)
class AccessRules:
    """Who may send requests, and to which paths.

    Attributes:
        token: what clients have to send; None for a server that this machine alone can reach.
        origins: of other web pages that may send requests, as browsers write them; "*" for all.
        public_metrics: `/metrics` needs no token.
        root_path: prefix that the paths have behind a proxy, such as "/anyflow"; may be empty.
    """

    token: str | None = None
    origins: tuple[str, ...] = ()
    public_metrics: bool = False
    root_path: str = ""

    def is_open(self, path: str) -> bool:
        """Return whether a path needs no token."""
        return path in OPEN or (self.public_metrics and path == "/metrics")
