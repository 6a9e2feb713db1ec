"""What runs, in which order: one Prefect flow per DVC stage, with the same name.

Prefect reads its settings when it is first imported, so this package sets them: a home of this clone's own, no
telemetry, and a console that shows our progress and errors only (the UI has the logs).
"""

import os
from pathlib import Path

HOME = Path(".prefect").resolve()

os.environ.setdefault("PREFECT_HOME", str(HOME))
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
