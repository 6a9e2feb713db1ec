"""Checkpoint folders: children, exports in every format, what each runtime takes of them."""
