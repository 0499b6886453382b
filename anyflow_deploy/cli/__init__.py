"""The commands, one module each; `options` is how they all read their flags."""
