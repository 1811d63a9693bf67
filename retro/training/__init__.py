"""Training: windows of chunks with their neighbors, the loop, checkpoints, sharding, and one module a recipe."""
