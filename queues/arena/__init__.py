"""Columns in shared memory: what one process writes once and the others of its host read in place.

`home` says whether this host has an arena and where; `space` gives out room (pure); `segment` is one mapped pair of
files and its control words; `writer` owns segments, `reader` maps those of others, `keeper` takes over those of the
dead.
"""
