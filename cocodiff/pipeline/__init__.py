"""Around a diffusers pipeline: what is installed on it, what happens around each call, and its forward on shards."""
