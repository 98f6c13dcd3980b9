"""Fewer bytes on slow links: the schedule of bits, codecs, and copies of what the receiver holds."""
