"""Global distillation (GKD) of a child: its course, and the two ways to compute it, threads and ranks."""
