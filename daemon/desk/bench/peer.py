"""anomalib as a contender; `contender` runs this file under the Python that anomalib is installed in.

Its weights are untrained, for they decide nothing about speed, and nothing is downloaded. An order:
`{"kind": "anomalib", "network": NAME, "backbone": NAME, "size": PIXELS, "device": NAME, "by": "torch"|"openvino",
"folder": FOLDER}`; with `"kind": "anomalib-export"` the model is made and written into the folder, for another process
to load as a user would.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


class Player(NamedTuple):
    """As `contender.Player`, which cannot be imported from here."""

    engine: str
    read: Callable[[str], Any]
    judge: Callable[[Sequence[Any]], object]
    judge_files: Callable[[Sequence[str]], object]


def prepare(order: dict[str, Any]) -> Callable[[], Player]:
    """Import what is needed, and give what loads the contender."""
    torch = import_module("torch")
    _import_torchvision(torch)
    torch.set_flush_denormal(True)  # untrained weights might give such numbers, which are slow
    if order["kind"] == "anomalib-export":
        models = import_module("anomalib.models")
        return lambda: _export(order, models)
    deploy = import_module("anomalib.deploy")
    return lambda: _load(order, deploy, torch)


def _export(order: dict[str, Any], models: Any) -> Player:
    network, side = getattr(models, order["network"]), (order["size"], order["size"])
    settings = {"pre_processor": network.configure_pre_processor(side)}
    if order["network"] == "EfficientAd":
        settings["model_size"] = order["backbone"]
    else:
        settings |= {"backbone": order["backbone"], "pre_trained": False}
    model = network(**settings).eval()
    if order["by"] == "torch":
        model.to_torch(export_root=order["folder"])
    else:
        model.to_openvino(export_root=order["folder"])  # of any size: it resizes by itself
    return Player("", str, len, len)


def _load(order: dict[str, Any], deploy: Any, torch: Any) -> Player:
    weights = Path(order["folder"]) / "weights"
    model = f"{order['network']} {order['backbone']}"
    if order["by"] == "torch":
        os.environ["TRUST_REMOTE_CODE"] = "1"  # this pickle is our own
        inferencer = deploy.TorchInferencer(weights / "torch/model.pt", device=order["device"])
        engine = f"{model} by TorchInferencer, torch {torch.__version__} {inferencer.device}"
    else:
        os.chdir(order["folder"])  # it leaves a cache behind
        inferencer = deploy.OpenVINOInferencer(weights / "openvino/model.xml", device="CPU")
        precision = inferencer.model.get_property("INFERENCE_PRECISION_HINT").to_string()
        engine = f"{model} by OpenVINOInferencer, openvino {version('openvino')} cpu {precision}"
    numpy = import_module("numpy")

    def judge(image: Any) -> object:
        found = inferencer.predict(image)
        score, anomaly_map = found.pred_score, found.anomaly_map
        if isinstance(score, torch.Tensor):  # as with ours, the figures are in the computer's memory when it is done
            score, anomaly_map = score.detach().cpu().numpy(), anomaly_map.detach().cpu().numpy()
        return score, anomaly_map

    judge(numpy.zeros((256, 256, 3), numpy.uint8))
    return Player(
        engine,
        lambda file: numpy.asarray(import_module("PIL.Image").open(file).convert("RGB")),
        lambda images: [judge(image) for image in images],
        lambda files: [judge(file) for file in files],
    )


def _import_torchvision(torch: Any) -> None:
    """Import it although its operators are built for another torch; none of them is needed."""
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        _SCHEMAS.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _SCHEMAS[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")


_SCHEMAS: list[Any] = []
"""Lives as long as the process: a library takes its operators along when it is collected."""
