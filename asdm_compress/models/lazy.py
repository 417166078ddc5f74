"""UNets whose weights stay in their files until they are asked for, one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm_compress.core.errors import AsdmError
from asdm_compress.models.families import check_supported
from asdm_compress.models.folder import read_json, readable, refuse_misfit, unet_class
from asdm_compress.models.layout import is_ldm
from asdm_compress.models.ldm import UNET_PREFIX, unet_to_ldm
from asdm_compress.models.recognise import check_numbers
from asdm_compress.models.single_file import unet_prefix, unet_shapes
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.models.streaming import TensorReader, reading


@dataclass(frozen=True, slots=True)
class LazyUNet:
    """A UNet on the meta device, and how to get each of its tensors from the files, one at a time.

    `stored` are the names that the tensors have there.
    """

    unet: UNet2DConditionModel
    reader: TensorReader
    stored: Mapping[str, str]
    shapes: Mapping[str, torch.Size]

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a tensor is stored."""
        return self.reader.dtypes[self.stored[name]]

    def get(self, name: str) -> Tensor:
        """A tensor by its name in the UNet; raises AsdmError where it is missing or does not fit."""
        tensor = self.reader.get(self.stored[name])
        expected = self.shapes[name]
        if tensor.shape != expected:
            raise AsdmError(
                f"{self.stored[name]} in {self.reader.place} has the shape {tuple(tensor.shape)}, and its config says "
                f"{tuple(expected)}",
                "The files are damaged, or the config.json is not that of the weights.",
            )
        return tensor

    def filled(self, options: LoadOptions) -> UNet2DConditionModel:
        """The UNet with all its weights; raises AsdmError, naming tensors, for weights that are no numbers."""
        mismatched = [key for key, name in self.stored.items() if self.reader.shapes[name] != tuple(self.shapes[key])]
        refuse_misfit(self.reader.place, [], [], mismatched)
        raw = {key: self.reader.getters[name]() for key, name in self.stored.items()}
        check_numbers(self.reader.place, {self.stored[key]: tensor for key, tensor in raw.items()})
        dtype = options.dtype or next(iter(raw.values())).dtype
        self.unet.load_state_dict({key: raw.pop(key).to(dtype) for key in list(raw)}, assign=True)
        return self.unet


@contextmanager
def lazy_unet(source: Source, options: LoadOptions) -> Iterator[LazyUNet]:
    """Open a UNet without reading its weights. Raises AsdmError for everything that is wrong with the files."""
    assert source.path is not None
    folder = source.unet_folder
    place = source.path if folder is None else folder
    with reading(place, options.allow_pickle) as reader:
        built: Any = UNet2DConditionModel
        config = source.unet_config
        if config is None:
            found = read_json(place / "config.json")
            built = unet_class(place, found)
            config = {k: v for k, v in found.items() if not k.startswith("_")}
        with readable(place), torch.device("meta"):
            unet = built.from_config(dict(config))
        check_supported(unet)
        shapes = {key: tensor.shape for key, tensor in unet.state_dict().items()}
        stored, theirs = {key: key for key in shapes}, set(reader.names())
        if folder is None:
            prefix, own = unet_prefix(reader.shapes), unet_shapes(reader.shapes)
            theirs = {prefix + name for name in own}
            names = _ldm_names(unet, own) if is_ldm(own) else list(shapes)
            stored = {key: prefix + name for key, name in zip(shapes, names, strict=True)}
        refuse_misfit(place, [k for k in shapes if stored[k] not in reader], theirs - set(stored.values()), [])
        yield LazyUNet(unet, reader, stored, shapes)


def _ldm_names(unet: UNet2DConditionModel, own: Collection[str]) -> list[str]:
    """The names of a UNet's tensors in a file: without gaps, or with those that other converters leave in cut UNets."""
    for with_gaps in (True, False):
        names = [name.removeprefix(UNET_PREFIX) for name in unet_to_ldm(unet, with_gaps)]
        if len(names) == len(unet.state_dict()) and all(name in own for name in names):
            break
    return names
