"""What a run did: bytes by link and tensor, timelines, traces."""
