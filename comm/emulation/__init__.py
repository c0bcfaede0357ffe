"""L1: a vendor's device and collective library emulated on host memory, so that the device path runs without hardware.

Everything here says "emulated" in its names and output. It owns what the vendor table documents (device type, backend
name, limits) and refuses to say anything about a chip's speed or numerics: nothing was run on one.
"""
