"""Puts jobs in and takes results out. Imports neither torch nor anything that only POSIX has."""

from torchrelay.producer.futures import JobFuture
from torchrelay.producer.relay import Relay

__all__ = ["JobFuture", "Relay"]
