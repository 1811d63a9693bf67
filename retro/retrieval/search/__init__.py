"""Search in a store: exact, approximate (ScaNN, faiss), by words, fused, and over shards."""
