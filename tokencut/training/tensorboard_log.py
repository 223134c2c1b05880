"""The curves of a fine-tune in TensorBoard's format: the only place that knows it, an optional part of tokencut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencut.errors import ArtifactError
from tokencut.runtime import extras

# Written out at least this often, in seconds, for whoever watches.
FLUSH_EVERY = 10


class TensorboardLog:
    """Curves over the updates of a run.

    A run that goes on where it was cut writes to the same folder, from the update of its last checkpoint on; what an
    earlier part wrote of later updates no longer counts for TensorBoard, so no update is there twice.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the folder; what is written begins with the first values.

        Raises:
            TokencutError: tensorboard is not installed.
            ArtifactError: The folder cannot be made.
        """
        extras.require("`tensorboard` needs", "tensorboard", extra="tensorboard")
        self.folder = folder
        self._writer: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot make the folder {folder}: {error.strerror or error}; give `tensorboard` "
                                "another") from error  # fmt: skip

    def add(self, group: str, values: Mapping[str, float], update: int) -> None:
        """Adds a point to each of some curves.

        Args:
            group: Where they stand together.
            values: A value by the curve's name.
            update: How many updates of the weights were done.

        Raises:
            ArtifactError: They cannot be written.
        """
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.folder), purge_step=update, flush_secs=FLUSH_EVERY)
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, update)
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Has all that was added on disk.

        Raises:
            ArtifactError: It cannot be written.
        """
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Ends the file; further values would begin another.

        Raises:
            ArtifactError: It cannot be written.
        """
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ArtifactError:
        return ArtifactError(f"cannot write to {self.folder}: {error.strerror or error}; free space on its disk")
