"""Owns one node on one device: claim, batch, forward, commit; and the supervisor that keeps it alive."""
