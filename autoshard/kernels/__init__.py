"""Fused kernels behind one table, drawn on by `lower` alone, and `many`, the optimizer's. Start reading at `registry.py`, then any
kernel's file."""
