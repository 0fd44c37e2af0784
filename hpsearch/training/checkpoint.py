"""Checkpoint files and weights files. They are written atomically, and loading one never runs code from the file."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpsearch.config.model import UNetConfig
from hpsearch.data.cache import Normalization
from hpsearch.data.reading import READING_0_1, Reading
from hpsearch.errors import CheckpointError, ConfigError
from hpsearch.models.network import build_network, output_margin
from hpsearch.paths import FitPaths, atomic_write
from hpsearch.typed_json import from_json, to_json

logger = logging.getLogger(__name__)

FORMAT = 1
"""Format version of checkpoints; checkpoints of another version are skipped."""
WEIGHTS_FORMAT = 1
_MAGIC = b"hpsearch checkpoint\n"


def save_checkpoint(path: Path, state: Mapping[str, Any], *, previous: Path | None = None) -> None:
    """Write `state` (tensors and plain types) to `path` atomically. Rename the old file to `previous`, if given.

    The file consists of a magic line, the SHA-256 of the state, and the state in torch's format. With `previous`, the
    new file is read back before the old one is renamed. Raises StorageError if it differs from what was written.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    payload = buffer.getvalue()
    content = _MAGIC + hashlib.sha256(payload).digest() + payload
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        if previous is not None:
            if temporary.read_bytes() != content:
                raise OSError(f"{path} does not contain what was written to it: the disk is faulty")
            if path.exists():
                path.replace(previous)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote to a file, with its tensors on the CPU.

    Raises CheckpointError if the file is incomplete, has another format version, was written by another program, or
    contains anything but tensors and plain types. Objects of other types could run code when they are loaded, so such
    a file is refused before anything is loaded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from error
    head, payload = content[: len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
    if head != _MAGIC + hashlib.sha256(payload).digest():
        raise CheckpointError(f"{path} is not a complete checkpoint of hpsearch: its checksum is missing or wrong")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is refused: it contains more than tensors and plain types") from error
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}, but this version of hpsearch reads {FORMAT}")
    return cast("dict[str, Any]", state)


def load_latest(fit: FitPaths, digest: str) -> dict[str, Any] | None:
    """Return the newest valid checkpoint of a fit, or None if there is none.

    `digest` is the value of `FitTask.digest` for this fit. Invalid checkpoints are skipped with a warning. Raises
    CheckpointError if the newest valid checkpoint stores a different digest.
    """
    for path in filter(Path.exists, (fit.last, fit.previous)):
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; skipped", error)
            continue
        if state["digest"] == digest:
            return state
        raise CheckpointError(f"{fit.root} has a checkpoint of other settings, images or seeds: remove the folder")
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Description of a network, stored as JSON in its weights file."""

    model: UNetConfig
    in_channels: int
    """Number of input channels: 3 for RGB, 1 for grayscale."""
    normalization: Normalization
    size: tuple[int, int]
    """Height and width of the training images."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Additional values of plain types, such as the threshold."""

    @property
    def sees_windows(self) -> bool:
        """Whether the network was trained on crops of images. If so, its logits are never interpolated."""
        return self.extra.get("match") == "crop" or "frame" in self.extra

    @property
    def reading(self) -> Reading:
        """Rules by which the image files were decoded for training."""
        return from_json(Reading, self.extra["reading"]) if "reading" in self.extra else READING_0_1


def save_weights(path: Path, model: nn.Module, info: WeightsInfo) -> None:
    """Write a network and its description as a safetensors file. The same content gives the same bytes."""
    # Imported here because only saving weights needs it.
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    table = {"format": WEIGHTS_FORMAT, **to_json(info)}
    # Use a single key, because safetensors writes several keys in an order that differs between processes.
    content = safetensors.torch.save(tensors, {"hpsearch": _described(table, tensors)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def load_weights(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, WeightsInfo]:
    """Return the network of a weights file, in evaluation mode on `device`, and its description.

    Raises CheckpointError if the file is missing, incomplete or written by another program, or if the weights do not
    match the description. A pickle is refused without being loaded.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("hpsearch")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a complete safetensors file: {error}") from error
    if text is None:
        raise CheckpointError(f"{path} is not a weights file of hpsearch: it has no description of its network")
    try:
        table = json.loads(text)
        table.pop("sha256", None)
        # Compare as text, because different texts may parse to the same table.
        if _described(table, tensors) != text:
            raise CheckpointError(f"{path} was changed after it was written: its checksum is wrong")
        if table["format"] != WEIGHTS_FORMAT:
            raise ValueError(f"format {table['format']}, but this version of hpsearch reads {WEIGHTS_FORMAT}")
        # UNetConfig rejects unknown settings, because a setting of a later version may change the network's output.
        info = dataclasses.replace(from_json(WeightsInfo, table), model=UNetConfig(**table["model"]))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} has an invalid description of its network: {error}") from error
    margin = output_margin(info.model) if info.sees_windows else 0
    model = build_network(info.model, info.in_channels, margin=margin)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} contains weights that do not match the network it describes") from error
    return model.to(device).eval(), info


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array to a .npy file atomically, and append the file's SHA-256, which NumPy ignores."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    content = buffer.getvalue()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content + hashlib.sha256(content).digest())


def _described(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the description `table` of a weights file as JSON, with a SHA-256 of table and tensors added."""
    hashed = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    for name in sorted(tensors):
        hashed.update(name.encode() + tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return json.dumps({**table, "sha256": hashed.hexdigest()}, sort_keys=True)
