"""What runs, in which order: one Prefect flow per DVC stage, with the same name."""
