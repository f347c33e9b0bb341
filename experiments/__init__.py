"""Commands: what people run, and the only place where Hydra lives."""
