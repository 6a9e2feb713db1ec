"""Everything with a form on disk: typed params, records, paths, activation shards, library, checkpoints, tables."""
