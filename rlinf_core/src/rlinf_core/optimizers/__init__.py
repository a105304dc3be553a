"""Optimizers, schedules and their mathematics on torch alone; the classes of `[optim]` build on them."""
