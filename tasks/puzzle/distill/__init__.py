"""Blockwise local distillation (BLD) and global knowledge distillation (GKD)."""
