"""Decides which slot of which host serves which stage: loads in, desired states out. Pure decisions and one loop."""
