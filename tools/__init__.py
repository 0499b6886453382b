"""Tools for working on the project; they are not installed with it."""
