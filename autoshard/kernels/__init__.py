"""Fused kernels behind one table, drawn on by `lower` alone. Start reading at `registry.py`, then any kernel's file."""
