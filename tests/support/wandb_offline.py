"""Read back what a run logged in W&B's offline mode, from the `.wandb` file and the media beside it.

The file is a log in LevelDB's format: a header of seven bytes, then blocks of 32 KiB of records (checksum, length,
type: whole or first, middle, last part) whose payloads are protobuf messages.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HEADER = 7
_BLOCK = 32768
_MAGIC = 0xBEE1
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineRun:
    """What one offline run holds: its folder, its configuration, its history rows and its media files by key."""

    folder: Path
    config: dict[str, Any]
    history: list[dict[str, Any]]

    def column(self, key: str) -> list[Any]:
        """Return the values of one history key, in order of logging."""
        return [row[key] for row in self.history if key in row]

    def media(self, key: str) -> list[Path]:
        """Return the files of an image, a table or another medium that was logged under `key`."""
        files: list[str] = []
        for row in self.history:
            value = row.get(key)
            if isinstance(value, dict):
                files += value.get("filenames", [value["path"]] if "path" in value else [])
        return [self.folder / "files" / name for name in files]

    def tables(self, key: str) -> list[dict[str, Any]]:
        """Return the tables logged under `key` as `{"columns": ..., "data": ...}`."""
        return [json.loads(path.read_text()) for path in self.media(key)]


def read_runs(save_dir: str | Path) -> list[OfflineRun]:
    """Read all offline runs under `save_dir`, after `wandb.finish()`."""
    return [read_run(file) for file in sorted(Path(save_dir).glob("wandb/offline-run-*/run-*.wandb"))]


def read_run(file: Path, seconds: float = 60) -> OfflineRun:
    """Read one `.wandb` file; on a busy machine its last record comes to the disk somewhat after `wandb.finish()`."""
    end = time.monotonic() + seconds
    records = _records(file)
    while not (records and records[-1].WhichOneof("record_type") == "exit"):
        if time.monotonic() > end:
            raise TimeoutError(f"{file} was not finished within {seconds} s")
        time.sleep(0.05)
        records = _records(file)
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                _set(row, list(item.nested_key) or [item.key], json.loads(item.value_json))
            history.append(row)
        elif kind in ("run", "config"):
            update = record.run.config if kind == "run" else record.config
            for item in update.update:
                _set(config, list(item.nested_key) or [item.key], json.loads(item.value_json))
    return OfflineRun(file.parent, config, history)


def _records(file: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    return [Record.FromString(payload) for payload in _payloads(data)] if len(data) > _HEADER else []


def _set(row: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        row = row.setdefault(key, {})
    row[keys[-1]] = value


def _payloads(data: bytes) -> Iterator[bytes]:
    ident, magic, _version = struct.unpack("<4sHB", data[:_HEADER])
    if ident != b":W&B" or magic != _MAGIC:
        raise ValueError("this is no .wandb file")
    position, parts = _HEADER, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:  # too little for a header: the writer pads the block
            position += left
            continue
        _checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        if len(chunk) < length:  # still being written
            return
        position += 7 + length
        if kind in (_FULL, _LAST):
            yield parts + chunk if kind == _LAST else chunk
        parts = parts + chunk if kind in (_FIRST, _MIDDLE) else b""
