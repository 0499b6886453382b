"""Something cannot be measured here, and that is no failure: the reason goes into the report in its
place."""

from __future__ import annotations


class MeasurementUnavailableError(Exception):
    """Not there, not readable or not supported; the text says which, and what would change it."""
