"""The datastore on disk and opened: format, chunks, values [N, F], keys, documents."""
