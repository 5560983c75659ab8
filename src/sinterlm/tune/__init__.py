"""``sinterlm tune``: which tile each GEMM and each attention of a model should have on the device
at hand.

Stands on the compile side, which makes and checks the candidates, and on
``runtime.device_probe``, which times them.
"""
