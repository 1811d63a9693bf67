"""Who does the tasks of a long job: this machine, ranks, or a Ray cluster."""
