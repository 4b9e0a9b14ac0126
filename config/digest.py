"""The version of a pipeline: a digest of everything that changes its results, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torchrelay.config.imports import resolve_inside, source_digest
from torchrelay.config.spec import PipelineSpec, StageConfig
from torchrelay.errors import ConfigError

VERSION_LENGTH = 8


def version_of(spec: PipelineSpec, base_dir: Path) -> str:
    """8 hex digits over input, output, graph, code, args, weights, torch options, padding, wire and shards.

    Batch sizes, costs and buckets, waits, replicas, scaling, resources, hosts, retries, time-outs, queue marks,
    devices, what is fused and how a cut model is balanced are tuning: they do not change it. What is at its default is
    left out, so that a new option with a default leaves old versions as they were.
    Raises ConfigError when code or weights cannot be read.
    """
    after = any(s.after is not None for s in spec.stages)
    content = {
        "pipeline": spec.pipeline,
        "input": spec.input,
        "output": spec.output,
        "stages": [_stage(s, base_dir, after) for s in spec.stages],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=VERSION_LENGTH // 2).hexdigest()


def _stage(stage: StageConfig, base_dir: Path, after: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"name": stage.name}
    if stage.use is not None:
        out |= {"use": stage.use, "code": source_digest(stage.use, base_dir).hex()}
    if after:
        out["after"] = stage.after
    optional = {
        "inputs": stage.inputs,
        "outputs": stage.outputs,
        "args": stage.args,
        "torch": stage.torch.model_dump(exclude_defaults=True),
        "pad": stage.batch.pad,
        "rows": stage.rows if stage.rows == "expand" else stage.collapses and {"collapse": stage.collapses},
        "when": stage.when,
        "wire": stage.wire.model_dump(exclude_defaults=True),
        "shards": stage.shards and stage.shards.model_dump(exclude_defaults=True, exclude={"balance"}),
    }
    # `inputs: []` reads nothing, while no `inputs` reads all: the one is no default of the other.
    out |= {k: v for k, v in optional.items() if v or v == []}
    if stage.weights is not None:
        out["weights"] = _weights_digest(resolve_inside(stage.weights, base_dir, "weights")).hex()
    return out


def _weights_digest(path: Path) -> bytes:
    """Of an index, what it says and what is in the files that it names."""
    if not path.name.endswith(".safetensors.index.json"):
        return file_digest(path)
    try:
        named = json.loads(path.read_bytes())["weight_map"]
        files = sorted(set(named.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no index of weights, with a weight_map of names to files") from error
    parts = [file_digest(path)]
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{path}: names the file {file!r}; its files must lie beside it")
        parts.append(file_digest(path.with_name(file)))
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def file_digest(path: Path) -> bytes:
    """blake2b of a file's bytes, read in pieces."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
