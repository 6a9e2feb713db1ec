"""One unit of work each: read artifacts, call ``tasks.puzzle``, write artifacts (Prefect tasks)."""
