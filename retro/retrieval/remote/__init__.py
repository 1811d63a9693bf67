"""The retrieval service, searches over HTTP: client, server, and the wire between them."""
