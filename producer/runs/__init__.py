"""Dataset runs, the driver's side. Planning imports neither redis nor torch, and reads no more than it must."""
