"""How a student learns: losses, the three training stages, their Trainer, health."""
