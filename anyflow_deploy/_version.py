"""The version: the one place where it is written.

Python reads it here, hatchling reads this file for the wheel and the sdist, and CMake reads it for
the C++ library and generates `anyflow/version.h` from it. To release, change the line below and
CHANGELOG.md; tests hold the other files to it.
"""

__version__ = "0.2.0"
