"""Puts jobs in and takes results out. Imports neither torch nor anything that only POSIX has."""

from torchrelay.producer.async_futures import AsyncJobFuture
from torchrelay.producer.async_relay import AsyncRelay
from torchrelay.producer.encoding import Options
from torchrelay.producer.futures import JobFuture, Row, Table
from torchrelay.producer.relay import Relay

__all__ = ["AsyncJobFuture", "AsyncRelay", "JobFuture", "Options", "Relay", "Row", "Table"]
