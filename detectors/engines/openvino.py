"""OpenVINO: the fastest engine on a CPU. It and NNCF, which rounds to int8, are the extra `openvino`."""

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from detectors.artifact import Manifest
from detectors.base import ArtifactError
from detectors.engines import store
from detectors.engines.base import Comparison, EngineName, name_of

FILE = "model.xml"


class OpenVino:
    """An exported engine on the CPU. Satisfies `Engine`. Pictures are compared one by one: a CPU gains nothing by more.

    Threads of its pool sleep when there is nothing to do, so that other programs are not slowed down.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, key: str, threads: int = 0) -> None:
        core, name = _library().Core(), name_of(key)
        if name is EngineName.openvino_bf16 and not can_bf16():
            raise ArtifactError(
                f"this CPU has no bfloat16 arithmetic, which {name} is made for; export another engine on this machine"
            )
        settings = {
            "INFERENCE_PRECISION_HINT": "f32" if name is EngineName.openvino_fp32 or not can_bf16() else "bf16",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = core.compile_model(core.read_model(folder / FILE), "CPU", settings)
        except RuntimeError as error:
            raise ArtifactError(
                f"OpenVINO {version('openvino')} cannot run this model's {name} on this CPU "
                f"({' '.join(str(error).split()):.300}); export another engine"
            ) from error
        self.label = f"{key} openvino {version('openvino')} cpu"
        self._request = compiled.create_infer_request()
        self._outputs = range(len(compiled.outputs))

    def __call__(self, pixels: Tensor) -> Sequence[Tensor]:
        """Compare one picture after the other."""
        each: list[list[NDArray[np.float32]]] = []
        for picture in pixels.contiguous().numpy():
            self._request.infer({0: picture[np.newaxis]}, share_inputs=True)
            each.append([self._request.get_output_tensor(place).data.copy() for place in self._outputs])
        return [torch.from_numpy(np.concatenate(found)) for found in zip(*each, strict=True)]


def can_bf16() -> bool:
    """Whether this CPU computes in bfloat16 rather than imitating it."""
    return "BF16" in _library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def export(
    model: Path, manifest: Manifest, name: EngineName, comparison: Comparison, pictures: Sequence[Tensor]
) -> str:
    """Convert a comparison, put it into the model folder, and give its key.

    Args:
        model: the model folder.
        manifest: of the model.
        name: which engine.
        comparison: of the model, on the CPU.
        pictures: 1×3×S×S uint8 of good parts, of which the ranges of int8 are taken; some tens suffice.

    Raises:
        ArtifactError: nothing would be rounded by `openvino-mixed`.
    """
    with torch.no_grad():
        teacher, student, _ = map(len, comparison(pictures[0]))
    if name is EngineName.openvino_mixed and not student:
        raise ArtifactError(
            f"{name} rounds to int8 what is compared with the teacher, and {manifest.detector} has a teacher alone; "
            f"choose {EngineName.openvino_bf16} or {EngineName.openvino_int8}"
        )

    def fill(folder: Path) -> Mapping[str, str]:
        network, versions = convert(comparison, pictures[0]), {"openvino": version("openvino")}
        if name in {EngineName.openvino_int8, EngineName.openvino_mixed}:
            rounded = _above(network.outputs[: teacher + student])
            if name is EngineName.openvino_mixed:
                rounded -= _above(network.outputs[:teacher])
            network = _quantise(network, pictures, rounded)
            versions["nncf"] = version("nncf")
        found = network.get_results()[teacher + student :]
        network = _library().Model(found, network.get_parameters(), manifest.detector)
        _library().save_model(network, folder / FILE, compress_to_fp16=False)
        return versions

    return store.write(model, manifest, name, fill)


def convert(comparison: Comparison, picture: Tensor) -> Any:
    """A comparison, traced with a picture 1×3×S×S → OpenVINO's model of it for one picture.

    Its outputs are the teacher's features and what was found, in the comparison's order.
    """
    ov = _library()
    with torch.no_grad(), _quiet():
        network = ov.convert_model(torch.export.export(comparison.eval(), (picture,)))
    network.reshape(list(picture.shape))
    return network


def _quantise(network: Any, pictures: Sequence[Tensor], rounded: set[str]) -> Any:
    """Round to int8 the layers of these names, but for convolutions that look at the pixels: they are few, and exact.

    Activations are rounded symmetrically (the preset "performance"): asymmetric ranges are clipped where an anomaly
    exceeds what good parts show, which is just what must be seen. Ranges of good parts alone would clip it all the
    same, so each picture is shown once more with a patch of what no good part has.
    """
    shown = [*pictures, *(_patched(picture, seed) for seed, picture in enumerate(pictures))]
    with _quiet():
        import nncf

        nncf.set_log_level(logging.ERROR)
        layers = [layer for layer in network.get_ordered_ops() if _computes(layer)]
        exact = [layer.get_friendly_name() for layer in layers if _sees_pixels(layer) or _compares(layer)]
        exact += [name for layer in layers if (name := layer.get_friendly_name()) not in rounded]
        return nncf.quantize(
            network,
            nncf.Dataset([picture.numpy() for picture in shown]),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(shown),
            ignored_scope=nncf.IgnoredScope(names=exact, validate=False),
        )


def _patched(picture: Tensor, seed: int) -> Tensor:
    """1×3×S×S → a copy with a rectangle of coarse noise somewhere, each side of it 5 to 25 % of S."""
    rng = np.random.default_rng(seed)
    side = picture.shape[-1]
    height, width = (max(1, int(side * rng.uniform(0.05, 0.25))) for _ in range(2))
    top, left = (int(rng.integers(0, side - length)) for length in (height, width))
    grains = int(rng.integers(2, 9))
    noise = torch.from_numpy(rng.integers(0, 256, (1, 3, grains, grains), dtype=np.uint8))
    patched = picture.clone()
    patched[..., top : top + height, left : left + width] = functional.interpolate(noise, (height, width))
    return patched


def _above(outputs: Iterable[Any]) -> set[str]:
    """The names of all layers from which outputs are computed."""
    ends = [output.get_node() for output in outputs]
    return {layer.get_friendly_name() for end in ends for layer in (end, *_layers_above(end))}


def _layers_above(layer: Any) -> Iterator[Any]:
    """All layers from which one is computed, each once."""
    known: set[str] = set()
    waiting = [layer]
    while waiting:
        for value in waiting.pop().input_values():
            above = value.get_node()
            if above.get_friendly_name() not in known:
                known.add(above.get_friendly_name())
                waiting.append(above)
                yield above


def _sees_pixels(layer: Any) -> bool:
    """Whether it is a convolution, and there is none between it and the pixels."""
    return _convolves(layer) and not any(map(_convolves, _layers_above(layer)))


def _compares(layer: Any) -> bool:
    """Whether it is a step of a cosine: between the networks, or in the gate of a skip."""
    return layer.get_type_name() in {"Divide", "Multiply", "ReduceL2", "ReduceSum", "Maximum", "Power", "Sqrt"}


def _convolves(layer: Any) -> bool:
    return "Convolution" in str(layer.get_type_name())


def _computes(layer: Any) -> bool:
    return layer.get_type_name() not in {"Parameter", "Constant", "Result"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to themselves what exporters say to programmers."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield


def _library() -> Any:
    # Its tools and NNCF tell their maker about each conversion unless this package is missing; plants do not want that.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # this is how to say "missing"
    try:
        import openvino
    except ImportError:
        raise ArtifactError(
            "this engine needs OpenVINO, which is not installed: pip install 'inspectd[openvino]', or choose "
            'engine = "torch" and calibrate with it'
        ) from None
    return openvino
