"""What a run did: bytes by level and tensor, timelines, traces, and what these show."""
