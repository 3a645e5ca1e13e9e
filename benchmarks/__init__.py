"""What a training step costs, beside plain PyTorch on the same machine."""
