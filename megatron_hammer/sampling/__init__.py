"""Which tokens sample number i of a run is, and reading them: indices, order, blend, samples, batches."""
