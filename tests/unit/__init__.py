"""Tests that run in seconds: nothing is exported, compiled or served."""
