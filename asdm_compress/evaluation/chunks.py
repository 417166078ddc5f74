"""Work on images in chunks, each kept in a file when it is done, so that a run that was killed goes on.

A chunk is a range of image numbers. It does not depend on how many processes share the work, so that the next run may
have more or fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asdm_compress.core.files import output_file
from asdm_compress.core.processes import Processes

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Chunks:
    """`total` images in chunks of `size`, kept in `folder`."""

    folder: Path
    total: int
    size: int

    def compute(
        self, work: Callable[[range], Mapping[str, Tensor]], processes: Processes, progress: Callable[[int, int], None]
    ) -> None:
        """Do what is not there yet; every process its share of the chunks. All wait until all is done."""
        missing = processes.on_main(lambda: [i for i in range(self.count) if not self.path(i).is_file()])
        mine = processes.share(missing)
        total = sum(len(self.rows(i)) for i in mine)
        done = 0
        for number in mine:
            rows = self.rows(number)
            found = {name: tensor.detach().cpu().contiguous() for name, tensor in work(rows).items()}
            with output_file(self.path(number)) as aside:
                save_file(found, aside)
            done += len(rows)
            progress(done, total)
        processes.wait()

    def load(self) -> Tensors:
        """Everything, in the images' order, by name."""
        parts = [load_file(self.path(i)) for i in range(self.count)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def drop_damaged(self) -> None:
        """Remove files that cannot be read, such as a machine leaves that lost its power."""
        for number in range(self.count):
            path = self.path(number)
            if path.is_file():
                try:
                    load_file(path)
                except (OSError, SafetensorError):
                    path.unlink()

    @property
    def count(self) -> int:
        """The number of chunks."""
        return -(-self.total // self.size)

    def rows(self, number: int) -> range:
        """The images of a chunk."""
        return range(number * self.size, min((number + 1) * self.size, self.total))

    def path(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{number:06d}.safetensors"
