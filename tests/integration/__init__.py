"""Tests that export, compile, start servers, or run commands as a user does."""
