"""What the two servers share: errors as one sentence, who may ask, limits, a thread that works, the socket."""
