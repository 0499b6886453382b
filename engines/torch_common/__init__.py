"""What backends whose runtime is torch share: the device and the bundle's weights.

torch is imported inside the functions that use it.
"""
