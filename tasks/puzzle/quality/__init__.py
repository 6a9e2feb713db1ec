"""Quality that a replacement or a child loses against the parent: replace-1-block scores, evaluation, accuracy."""
