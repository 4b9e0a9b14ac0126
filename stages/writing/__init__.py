"""Writes the results of a run as parts, and reads them back. Knows nothing of Redis.

`part` writes one (layout -> format -> temporary file -> final name); `found` finds and reads them; `stores` is the
folder, local or behind a URL; `layout` and `arrow` say how a column's values lie in a file.
"""

from __future__ import annotations

from torchrelay.stages.writing.found import Output
from torchrelay.stages.writing.part import Written, open_output, write_part
from torchrelay.stages.writing.record import PartId, RowError
from torchrelay.stages.writing.table import PartRows, check_names

__all__ = ["Output", "PartId", "PartRows", "RowError", "Written", "check_names", "open_output", "write_part"]
