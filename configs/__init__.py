"""Configurations that come with the library, read by name: the first word of a file is the verb that reads it."""
