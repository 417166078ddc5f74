"""Profiling: what every site of a UNet costs in parameters, MACs, memory and measured time."""
