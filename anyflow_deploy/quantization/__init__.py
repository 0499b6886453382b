"""What export and engines share about 8-bit precision, without torch.

`calibration` is calibration.json, typed, and `layers` says which layers become 8-bit.
"""
