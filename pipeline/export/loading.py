"""From a folder that `protoshard export` made, or from a run, to a model that gives unit embeddings."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dali_loaders.extras import extra
from dali_loaders.regular import open_regular
from pipeline import backbones
from pipeline.evaluation.embed import features_of
from pipeline.export import description
from pipeline.export.description import CONFIG, WEIGHTS, Description

with extra("export"):
    from safetensors import SafetensorError, safe_open

log = logging.getLogger(__name__)


class Model(nn.Module):
    """Images to unit embeddings, as `protoshard eval` makes them of the same checkpoint.

    network: images float32 [b, 3, H, W] to features [b, D] that are not normalised
    description: what it takes and gives; its thresholds
    path: what sentences call it"""

    def __init__(self, network: nn.Module, about: Description, path: str) -> None:
        super().__init__()
        self.network, self.description, self.path = network, about, path
        self.eval()

    def forward(self, images_b3HW: Tensor) -> Tensor:
        """Embeddings float32 [b, D] of unit length. Images: RGB, (x - 127.5) / 127.5. ValueError for images of another size."""
        return self.embedded(images_b3HW, self.description.flip)

    @torch.no_grad()
    def embedded(self, images_b3HW: Tensor, flip: bool) -> Tensor:
        """The same with or without the features of the mirror image. Of features that are not finite a row of NaN."""
        side = self.description.image_size
        if images_b3HW.ndim != 4 or images_b3HW.shape[1:] != (3, side, side):
            raise ValueError(f"{self.path} takes images [b, 3, {side}, {side}], not {list(images_b3HW.shape)}: resize or cut them first")
        return normalize(features_of(self.network, images_b3HW, flip))

    def embed(self, images: Sequence[str | os.PathLike[str] | bytes]) -> Tensor:
        """Embeddings float32 [n, D] of image files, given as paths or as their contents, on the CPU. Images of another size are stretched,
        as in training, and the log says so; cut faces out before. ValueError for one that cannot be decoded, and for an embedding that is
        not finite."""
        from pipeline.export import decoding  # here, because a model that is given tensors needs no OpenCV

        device, side = next(self.network.parameters()).device, self.description.image_size
        parts, other = [], []
        for start in range(0, len(images), self.description.batch_size):
            some = images[start : start + self.description.batch_size]
            decoded = [decoding.decoded_file(image, side) for image in some]
            other += [image for image, (_, size) in zip(some, decoded, strict=True) if size != (side, side)]
            embedding_bD = self(decoding.batch_of([pixels for pixels, _ in decoded]).to(device)).cpu()
            bad = (~torch.isfinite(embedding_bD).all(dim=1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{self.path} gives an embedding that is not finite for {decoding.called(some[bad[0]])}")
            parts.append(embedding_bD)
        if other:
            log.warning("%d images are not %d x %d pixels and are stretched, such as %s", len(other), side, side, decoding.called(other[0]))
        return torch.cat(parts) if parts else torch.zeros(0, self.description.backbone.width)


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", recipe: str | None = None) -> Model:
    """The model in a folder that `protoshard export` made, or in a copy of one, such as a snapshot of the Hugging Face hub.

    recipe: the recipe file that registers the network, if it is one's own and not registered yet. It is a program, and is run.
    Nothing else of the folder runs. ValueError, with a sentence, where the folder is not whole or not what its config.json says."""
    folder = os.fspath(folder)
    about = description.read(folder)
    if recipe:
        from pipeline.resolve import resolve

        resolve(recipe)
    name = about.backbone.name
    if name not in backbones.names():
        remedy = f"{recipe} does not register it either" if recipe else "name the recipe file that registers it: --recipe FILE.py"
        raise ValueError(f"{folder} has backbone {name!r}, which is none of protoshard's: {remedy}")
    network = network_of(about, folder)
    digest = digest_of(network.state_dict())
    if digest != about.weights:
        raise ValueError(f"{folder}/{WEIGHTS} does not hold the weights that {CONFIG} names: it has changed, or is of another export")
    return Model(network.to(device), about, folder)


def network_of(about: Description, folder: str) -> nn.Module:
    """The network with the weights of the folder, in eval mode. It is built only once the shapes in the file are known to be its own, since
    a config.json can claim any number of weights."""
    path = os.path.join(folder, WEIGHTS)
    try:
        with open(path, "rb", opener=open_regular):  # or a named pipe would be waited for
            pass
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it has no other
            with suppress(RuntimeError, NotImplementedError), torch.device("meta"):  # networks of one's own may need real numbers
                _check_shapes(backbones.build(about.backbone, about.image_size).state_dict(), shapes, path)
            with torch.random.fork_rng(devices=[]):  # whoever loads a model keeps their random numbers
                network = backbones.build(about.backbone, about.image_size)
            _check_shapes(network.state_dict(), shapes, path)
            network.load_state_dict({name: file.get_tensor(name) for name in shapes})
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): an export is whole only with it") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file ({error}): copy or export it again") from error
    return network.eval()


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names; 0.5 s for 250 MB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode(errors="surrogateescape"))
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_shapes(network: Mapping[str, Tensor], file: Mapping[str, tuple[int, ...]], path: str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in network.items()}
    if wanted != file:
        name = next(name for name in sorted({*wanted, *file}) if wanted.get(name) != file.get(name))
        found, expected = (list(shapes[name]) if name in shapes else "missing" for shapes in (file, wanted))
        raise ValueError(f"{path} is of another network than {CONFIG} says: {name} is {found} in the file and {expected} in the network")
