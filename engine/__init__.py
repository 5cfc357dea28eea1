"""Training, shared by every model: one loop, ranks, precision, optimizers, schedules, checkpoints, metrics."""
