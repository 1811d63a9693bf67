"""What a datastore will cost before it is built."""
