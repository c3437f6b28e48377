"""Thousands of short sessions on virtual time, each with its own bad day, each checked to the last share."""
