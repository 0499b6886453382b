"""What backends whose runtime is torch share: the device and the bundle's weights. Torch is
imported when it is asked for."""
