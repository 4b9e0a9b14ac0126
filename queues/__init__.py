"""The protocol that all processes share: jobs, tensors, keys, transitions, the server. Imports no torch."""
