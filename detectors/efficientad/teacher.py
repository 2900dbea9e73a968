"""EfficientAD's frozen teacher from a file: ours, or one that others have published."""

import re
from pathlib import Path

from torch import Tensor

from detectors.base import ArtifactError
from detectors.efficientad.network import PDN, Size
from detectors.teacher import read_weights

FOLDER_FILE = "teacher.pt"


def load_pdn(path: Path) -> PDN:
    """Read a teacher, S or M as its shapes tell.

    `path` is a safetensors file of `distillation.distil`, a PyTorch state dict of nelson1425/EfficientAD
    (`teacher_small.pth`), anomalib (`pretrained_teacher_small.pth`) or PUAD (`teacher.pt`), or PUAD's teacher folder.
    The `mu.pt` and `sigma.pt` in that folder are not read: they belong to the network it was distilled from; the
    teacher's own are measured on the training images.

    Raises:
        ArtifactError: no such file, or not a teacher's weights.
    """
    file = path / FOLDER_FILE if path.is_dir() else path
    state = _renamed(read_weights(file))
    first = state.get("conv1.weight")
    size: Size = "m" if first is not None and len(first) > 128 else "s"  # noqa: PLR2004 -- width of S's first layer
    pdn = PDN(size)
    expected = pdn.state_dict()
    if state.keys() != expected.keys():
        odd = min(state.keys() ^ expected.keys())
        raise ArtifactError(f"{file} holds no teacher of EfficientAD: {odd} is {'odd' if odd in state else 'missing'}")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            found, wanted = ("×".join(map(str, t.shape)) for t in (tensor, expected[key]))
            raise ArtifactError(f"{file} holds no teacher of EfficientAD: {key} has shape {found} instead of {wanted}")
    pdn.load_state_dict(state)
    return pdn.eval()


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Count the layers where the file gives their places in an `nn.Sequential` (0, 3, 6, 8 …)."""
    if not all(re.fullmatch(r"\d+\.\w+", key) for key in state):
        return state
    places = sorted({int(key.partition(".")[0]) for key in state})
    heads = {str(place): f"conv{number}" for number, place in enumerate(places, 1)}
    return {f"{heads[key.partition('.')[0]]}.{key.partition('.')[2]}": tensor for key, tensor in state.items()}
