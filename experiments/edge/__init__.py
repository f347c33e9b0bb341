"""The edge runner: Flower's device side in two small processes, see `experiments.edge.launcher`."""
