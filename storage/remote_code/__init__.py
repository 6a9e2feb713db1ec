"""Code that an export copies into a checkpoint, for engines that read children through transformers' `auto_map`."""
