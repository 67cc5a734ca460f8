"""Who merges, and what bounds them: one process each, see `benchmarks.processes.answer`."""
