"""The error of a measurement that cannot be made here; its reason goes into the report."""

from __future__ import annotations


class MeasurementUnavailableError(Exception):
    """A measurement that is missing, unreadable or unsupported.

    The text says which, and what would change it.
    """
