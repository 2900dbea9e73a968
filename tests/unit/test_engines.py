"""Every engine beside the reference, and exports that are missing, edited or another model's."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from config.schema import Settings
from daemon.build import build_detector, export_engine, export_onnx
from daemon.cli import app
from detectors import patchcore
from detectors.artifact import Manifest, read_manifest
from detectors.base import ArtifactError, Image
from detectors.efficientad import detector as efficientad
from detectors.efficientad.comparison import EfficientADComparison
from detectors.efficientad.network import PDN, EfficientAD
from detectors.engines import store
from detectors.engines.base import Compared, Comparison, Engine, EngineName, key, name_of
from detectors.engines.cuda import COUNTS, fitting
from detectors.engines.folding import folded
from detectors.engines.start import candidates, export, reference, starter
from detectors.patchcore import coreset, describe
from detectors.preprocess import Preprocess
from detectors.reverse_distillation import detector as reverse_distillation
from detectors.reverse_distillation.comparison import ReverseDistillationComparison
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.reverse_distillation.training import RECIPES
from detectors.teacher import Teacher, preprocess_for

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")

EXACT = 1e-4
ROUNDED = {EngineName.openvino_bf16: 0.005, EngineName.openvino_mixed: 0.005, EngineName.openvino_int8: 0.03}
"""How far a score may be from the reference's, as a share of it; measured: a fifth of it and less."""
EXPORTED = [
    pytest.param(EngineName.openvino_fp32, marks=needs_openvino),
    pytest.param(EngineName.onnxruntime_fp32, marks=needs_onnx),
]


class Tiny(Comparison):
    """Two networks of three layers. The teacher is 16 wide inside, its student 24."""

    def __init__(self, seed: int = 0, *, student: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.teacher, self.student = _network(16), _network(24)
        self._has_student = student
        self._dtype = torch.float32

    def forward(self, pixels: Tensor) -> Compared:
        x = (pixels.float() / 255 - 0.5).to(self._dtype)
        told, imitated = self.teacher(x), self.student(x)
        found = 1 - functional.cosine_similarity(told.float(), imitated.float(), dim=1)
        return Compared([told], [imitated], [found]) if self._has_student else Compared([told], [], [told.float()])

    def round_networks(self) -> "Tiny":
        self.to(torch.bfloat16)
        self._dtype = torch.bfloat16
        return self


def _network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 32, 2, stride=2),
    )


TINY = Manifest("tiny", {"size": 64}, {}, {}, {})


def picture(seed: int) -> Image:
    """Soft shapes with an edge and a little noise, as a camera gives them."""
    rng = np.random.default_rng(seed)
    soft = torch.from_numpy(rng.uniform(40, 210, (1, 3, 5, 5)))
    image = functional.interpolate(soft, (90, 110), mode="bicubic")[0].permute(1, 2, 0).numpy()
    image[20 + seed :, 30:70] *= 0.7
    return (image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def pixels(count: int, size: int = 64) -> Tensor:
    return Preprocess(size, (0, 0, 0), (1, 1, 1)).resize(picture(seed) for seed in range(count))


def learned(module: nn.Module) -> nn.Module:
    """Give norms what training would have: figures that do something."""
    chance = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.3, generator=chance)
            norm.running_var.uniform_(0.5, 2, generator=chance)
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5, generator=chance)
                norm.bias.normal_(0, 0.2, generator=chance)
    return module.eval()


def reverse_distillation_network(name: str, backbone: str) -> ReverseDistillation:
    torch.manual_seed(0)
    recipe = RECIPES[name]
    network = ReverseDistillation(Teacher(backbone), recipe.skips, gate=recipe.gate, projected=recipe.projected)
    learned(network)
    return network


def efficientad_network() -> EfficientAD:
    torch.manual_seed(0)
    return EfficientAD(PDN("s")).eval()


def save_gsk_rd4ad(folder: Path) -> None:
    network = reverse_distillation_network("gsk_rd4ad", "efficientnet_lite0")
    reverse_distillation.save(folder, "gsk_rd4ad", network, preprocess_for("efficientnet_lite0", 64), {})


def save_rdpp(folder: Path) -> None:
    network = reverse_distillation_network("rdpp", "resnet18")
    reverse_distillation.save(folder, "rdpp", network, preprocess_for("resnet18", 64), {})


def save_efficientad(folder: Path) -> None:
    efficientad.save(folder, efficientad_network(), {})


def save_patchcore(folder: Path) -> None:
    torch.manual_seed(0)
    teacher, preprocess = Teacher("efficientnet_lite0"), preprocess_for("efficientnet_lite0", 64)
    learned(teacher)
    bank = coreset([describe(picture(9), teacher, preprocess)], 12, 0, lambda *_: None)
    patchcore.save(folder, teacher, bank, preprocess, {})


FAMILIES: dict[str, Callable[[Path], None]] = {
    "gsk_rd4ad": save_gsk_rd4ad,
    "rdpp": save_rdpp,
    "efficientad_s": save_efficientad,
    "patchcore": save_patchcore,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def saved(family: str) -> Path:
        if not (folder / family).exists():
            FAMILIES[family](folder / family)
        return folder / family

    return saved


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[EngineName], tuple[Path, str]]:
    """A tiny model's export for an engine: its folder and its key."""
    folder = tmp_path_factory.mktemp("tiny")
    known: dict[EngineName, str] = {}

    def of(name: EngineName) -> tuple[Path, str]:
        if name not in known:
            known[name] = export(folder, TINY, name, Tiny().eval(), [p[None] for p in pixels(20)])
        return folder, known[name]

    return of


def start(folder: Path, key: str) -> Engine:
    return starter(folder, TINY, key, "cpu", 1)(Tiny)


def off(engine: Engine, count: int = 3) -> float:
    """The largest difference of a score from the reference's, as a share of it."""
    expected = reference(Tiny)(pixels(count))[0].amax((1, 2))
    scores = engine(pixels(count))[0].amax((1, 2))
    return float(((scores - expected).abs() / expected).max())


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_the_setting_names_every_engine() -> None:
    assert get_args(Settings.model_fields["engine"].annotation) == ("auto", *EngineName)


def test_the_page_on_engines_lists_every_engine() -> None:
    page = (Path(__file__).parents[2] / "docs/engines.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE) == [*EngineName]


def test_a_key_names_its_engine_and_a_label_without_one_is_the_references() -> None:
    assert name_of(key("openvino-int8/12ab34cd openvino 2026.4 cpu")) is EngineName.openvino_int8
    assert name_of(key("")) is EngineName.torch
    with pytest.raises(ArtifactError, match="no engine is called abacus; choose one of torch, openvino-fp32"):
        name_of("abacus")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(EngineName.openvino_fp32, "gsk_rd4ad", marks=needs_openvino),
        pytest.param(EngineName.openvino_fp32, "efficientad_s", marks=[needs_openvino, pytest.mark.long]),
        pytest.param(EngineName.openvino_fp32, "patchcore", marks=[needs_openvino, pytest.mark.long]),
        pytest.param(EngineName.openvino_fp32, "rdpp", marks=[needs_openvino, pytest.mark.long]),
        pytest.param(EngineName.onnxruntime_fp32, "rdpp", marks=[needs_onnx, pytest.mark.long]),
        pytest.param(EngineName.onnxruntime_fp32, "gsk_rd4ad", marks=[needs_onnx, pytest.mark.long]),
        pytest.param(EngineName.onnxruntime_fp32, "efficientad_s", marks=[needs_onnx, pytest.mark.long]),
        pytest.param(EngineName.onnxruntime_fp32, "patchcore", marks=[needs_onnx, pytest.mark.long]),
    ],
)
def test_an_exported_engine_in_float32_judges_as_the_reference(
    name: EngineName, family: str, models: Callable[[str], Path]
) -> None:
    model = models(family)
    key = export_engine(model, name, [picture(0)])
    fast, exact = build_detector(model, "cpu", 1, engine=key), build_detector(model, "cpu", 1)
    images = [picture(1), picture(2)]
    together = fast.predict(images)
    for prediction, expected in zip(together, exact.predict(images), strict=True):
        assert prediction.anomaly_score == pytest.approx(expected.anomaly_score, rel=EXACT)
        assert np.abs(prediction.anomaly_map - expected.anomaly_map).max() <= EXACT * expected.anomaly_score
    (alone,) = fast.predict(images[1:])
    assert alone.anomaly_score == pytest.approx(together[1].anomaly_score, rel=1e-5)
    assert fast.engine.startswith(f"{name}/")


@needs_openvino
@pytest.mark.parametrize("name", ROUNDED)
def test_an_engine_that_rounds_is_near_the_reference(
    name: EngineName, made: Callable[[EngineName], tuple[Path, str]]
) -> None:
    from detectors.engines.openvino import can_bf16

    if name is EngineName.openvino_bf16 and not can_bf16():
        pytest.skip("this CPU has no bfloat16")
    assert 0 < off(start(*made(name))) < ROUNDED[name]


@needs_openvino
def test_ranges_of_good_parts_have_room_for_what_none_of_them_shows(tmp_path: Path) -> None:
    grey = [torch.randint(120, 136, (1, 3, 64, 64), generator=chance(seed)).to(torch.uint8) for seed in range(20)]
    engine = start(tmp_path, export(tmp_path, TINY, EngineName.openvino_int8, Tiny().eval(), grey))
    spoiled = grey[0].clone()
    spoiled[:, :, 20:40, 20:40] = torch.randint(0, 256, (1, 3, 20, 20), generator=chance(0)).to(torch.uint8)
    expected, found = (float(run(spoiled)[0].std()) for run in (reference(Tiny), engine))
    assert found == pytest.approx(expected, rel=0.1)


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@needs_openvino
def test_mixed_rounds_no_layer_of_the_teacher_and_no_engine_the_layers_that_see_pixels(
    made: Callable[[EngineName], tuple[Path, str]],
) -> None:
    pixels, teacher, student = {(3, 16), (3, 24)}, {(16, 16)}, {(24, 24)}
    assert convolutions(*made(EngineName.openvino_fp32)) == (set(), pixels | teacher | student)
    assert convolutions(*made(EngineName.openvino_mixed)) == (student, pixels | teacher)
    assert convolutions(*made(EngineName.openvino_int8)) == (teacher | student, pixels)


def convolutions(folder: Path, key: str) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Channels in and out of the convolutions that compute in int8, and of those that do not."""
    import openvino

    network = openvino.Core().read_model(store.find(folder, TINY, key) / "model.xml")
    rounded: set[tuple[int, int]] = set()
    exact: set[tuple[int, int]] = set()
    for layer in network.get_ordered_ops():
        if layer.get_type_name() == "Convolution":
            before = layer.input_value(0).get_node().get_type_name()
            channels = (layer.get_input_shape(0)[1], layer.get_output_shape(0)[1])
            (rounded if before == "FakeQuantize" else exact).add(channels)
    return rounded, exact


@needs_openvino
def test_mixed_is_refused_where_there_is_no_student(tmp_path: Path) -> None:
    alone = Tiny(student=False).eval()
    with pytest.raises(ArtifactError, match="tiny has a teacher alone; choose openvino-bf16 or openvino-int8"):
        export(tmp_path, TINY, EngineName.openvino_mixed, alone, [pixels(1)])
    assert store.exports(tmp_path) == []


@needs_openvino
def test_what_is_tried_depends_on_the_device_and_on_the_model() -> None:
    from detectors.engines.openvino import can_bf16

    assert candidates("cuda", TINY) == [EngineName.cudagraph_bf16]
    assert {EngineName.openvino_fp32, EngineName.openvino_int8} <= set(candidates("cpu", TINY))
    assert (EngineName.openvino_mixed in candidates("cpu", TINY)) == can_bf16()
    assert EngineName.openvino_mixed not in candidates("cpu", replace(TINY, detector="patchcore"))


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_listed_under_a_key_that_tells_its_content_and_can_be_taken_away(
    name: EngineName, tmp_path: Path
) -> None:
    keys = [export(tmp_path, TINY, name, Tiny(seed).eval(), [pixels(1)]) for seed in (0, 1)]
    assert keys[0] != keys[1]
    assert all(name_of(key) is name for key in keys)
    assert sorted(store.exports(tmp_path)) == sorted(keys)
    store.discard(tmp_path, keys[0])
    assert store.exports(tmp_path) == keys[1:]
    with pytest.raises(ArtifactError, match=rf"holds no engine {keys[0]}; restore it, or run `inspectd export"):
        start(tmp_path, keys[0])


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_of_another_model_is_refused(
    name: EngineName, made: Callable[[EngineName], tuple[Path, str]]
) -> None:
    folder, key = made(name)
    with pytest.raises(ArtifactError, match="was exported from another model than lies in"):
        starter(folder, replace(TINY, settings={"size": 96}), key, "cpu", 1)(Tiny)


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("damage", ["cut off", "changed", "missing", "record"])
def test_a_damaged_export_is_refused(
    damage: str, name: EngineName, made: Callable[[EngineName], tuple[Path, str]]
) -> None:
    model, key = made(name)
    folder = store.find(model, TINY, key)
    file = folder / store.RECORD if damage == "record" else max(folder.iterdir(), key=lambda path: path.stat().st_size)
    before = file.read_bytes()
    if damage == "cut off":
        file.write_bytes(before[:-100])
    elif damage == "changed":
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(before) | {"versions": {}}))
    with pytest.raises(ArtifactError, match=rf"{file.name} .*(edited|SHA-256 differs).*; restore it, or run `inspectd"):
        start(model, key)
    file.write_bytes(before)
    start(model, key)


@needs_openvino
@needs_onnx
def test_another_process_starts_the_exports_of_a_folder(made: Callable[[EngineName], tuple[Path, str]]) -> None:
    folder, openvino = made(EngineName.openvino_fp32)
    _, onnxruntime = made(EngineName.onnxruntime_fp32)
    told = in_a_process(STARTS.format(here=__file__, folder=str(folder), keys=[openvino, onnxruntime]))
    assert told.returncode == 0, told.stderr
    assert [float(line) < EXACT for line in told.stdout.splitlines()] == [True, True]


HERE = """
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("tests.unit.test_engines", {here!r})
here = module_from_spec(spec)
spec.loader.exec_module(here)
"""
STARTS = f"""
{HERE}
for key in {{keys!r}}:
    print(here.off(here.start(Path({{folder!r}}), key)))
"""


def test_a_library_that_is_missing_is_named_with_its_cure(tmp_path: Path) -> None:
    told = in_a_process(LACKS.format(folder=str(tmp_path)))
    assert told.returncode == 0, told.stderr
    openvino, onnxruntime, onnxscript = told.stdout.splitlines()
    assert "needs OpenVINO, which is not installed: pip install 'inspectd[openvino]', or choose" in openvino
    assert "needs onnxruntime, which is not installed: pip install 'inspectd[onnx]', or choose" in onnxruntime
    assert "needs onnxscript, which is not installed: pip install 'inspectd[onnx]', or choose" in onnxscript


LACKS = """
import sys
sys.modules["openvino"] = sys.modules["onnxruntime"] = sys.modules["onnxscript"] = None
from pathlib import Path
from detectors.base import ArtifactError
from detectors.engines import onnx, openvino
for start in (openvino.OpenVino, onnx.OnnxRuntime):
    try:
        start(Path({folder!r}), "openvino-fp32/12345678")
    except ArtifactError as error:
        print(error)
try:
    onnx._convert(None, None, [])
except ArtifactError as error:
    print(error)
"""


@needs_onnx
@pytest.mark.parametrize("family", [pytest.param("gsk_rd4ad", marks=pytest.mark.long), "efficientad_s"])
def test_an_onnx_file_holds_all_from_pixels_to_map_and_score(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    import onnxruntime

    model, file = models(family), tmp_path / "whole.onnx"
    done = CliRunner().invoke(app, ["export", "--model", str(model), "--onnx", str(file)])
    assert done.exit_code == 0, done.output
    assert sorted(tmp_path.iterdir()) == [file]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["inspectd.model"] == read_manifest(model).fingerprint
    size = session.get_inputs()[0].shape[2]
    images = [picture(1), picture(2), picture(3)]
    expected = build_detector(model, "cpu", 1).predict(images)
    resized = Preprocess(size, (0, 0, 0), (1, 1, 1)).resize(images).numpy()
    for some_of, told in ((resized, expected), (resized[:1], expected[:1])):
        maps, scores = session.run(["anomaly_map", "anomaly_score"], {"pixels": some_of})
        assert scores == pytest.approx([one.anomaly_score for one in told], rel=EXACT)
        assert np.abs(maps - np.stack([one.anomaly_map for one in told])).max() <= EXACT * scores.max()


@needs_onnx
def test_a_model_that_is_more_than_networks_is_no_onnx_file(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a model of patchcore cannot be one ONNX file.*--engine onnxruntime-fp32"):
        export_onnx(models("patchcore"), tmp_path / "whole.onnx")
    assert [*tmp_path.iterdir()] == []


@needs_onnx
def test_an_onnx_file_in_a_folder_that_is_not_there_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent/whole.onnx cannot be written: name one in a folder"):
        export_onnx(models("rdpp"), tmp_path / "absent/whole.onnx")


def test_an_export_without_parts_or_a_file_asks_for_them(models: Callable[[str], Path]) -> None:
    done = CliRunner().invoke(app, ["export", "--model", str(models("patchcore"))])
    assert done.exit_code == 2
    assert "or --onnx FILE" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("network", "norms"),
    [
        pytest.param(lambda: reverse_distillation_network("gsk_rd4ad", "efficientnet_lite0"), 0, id="lite0"),
        pytest.param(lambda: reverse_distillation_network("rdpp", "resnet18"), 0, id="resnet18 with projections"),
        pytest.param(lambda: reverse_distillation_network("gsk_rd4ad", "resnet50"), 0, id="bottlenecks"),
    ],
)
def test_folded_norms_leave_what_is_computed_as_it_is(network: Callable[[], ReverseDistillation], norms: int) -> None:
    networks = network()
    comparison = ReverseDistillationComparison(networks, preprocess_for(networks.teacher.name, 64))
    fewer = folded(comparison)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in fewer.modules()) == norms
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in comparison.modules()) > 30
    with torch.no_grad():
        for before, after in zip(comparison(pixels(2)), fewer(pixels(2)), strict=True):
            for one, other in zip(before, after, strict=True):
                assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_a_norm_whose_convolution_is_seen_by_others_too_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            seen = self.conv(x)
            out: Tensor = seen + self.norm(seen)
            return out

    before = learned(nn.ModuleDict({"network": Shared()}))
    after = folded(before)
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(before["network"](x), after["network"](x))  # type: ignore[index] # a ModuleDict
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in after.modules())


def test_efficientad_has_nothing_to_fold() -> None:
    comparison = EfficientADComparison(efficientad_network(), None)
    with torch.no_grad():
        assert torch.equal(comparison(pixels(1, 256)).found[0], folded(comparison)(pixels(1, 256)).found[0])


def test_folded_networks_in_bfloat16_are_near_the_reference() -> None:
    networks = reverse_distillation_network("gsk_rd4ad", "resnet18")
    comparison = ReverseDistillationComparison(networks, preprocess_for("resnet18", 64)).eval()
    rounded = folded(comparison).round_networks()
    with torch.no_grad():
        for exact, found in zip(comparison(pixels(2)).found, rounded(pixels(2)).found, strict=True):
            assert found.dtype == torch.float32
            assert 0 < (exact - found).abs().max() < 0.02


@given(some.integers(1, COUNTS[-1]))
def test_pictures_go_into_the_smallest_graph_that_holds_them(count: int) -> None:
    chosen = fitting(count)
    assert chosen in COUNTS
    assert chosen >= count
    assert not any(count <= other < chosen for other in COUNTS)


def test_an_engine_for_a_gpu_is_refused_on_a_cpu(tmp_path: Path) -> None:
    assert export(tmp_path, TINY, EngineName.cudagraph_bf16, Tiny(), []) == "cudagraph-bf16"
    with pytest.raises(ArtifactError, match=r"cudagraph-bf16 runs on an NVIDIA GPU.*calibrate with another engine"):
        start(tmp_path, "cudagraph-bf16")


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_on_a_gpu_judge_as_the_reference_however_many_pictures_come(
    family: str, models: Callable[[str], Path]
) -> None:
    fast = build_detector(models(family), "cuda", engine="cudagraph-bf16")
    images = [picture(seed) for seed in range(11)]
    expected = [one.anomaly_score for one in build_detector(models(family), "cpu").predict(images)]
    for count in (1, 2, 3, 8, 11, 1):
        scores = [one.anomaly_score for one in fast.predict(images[:count])]
        assert scores == pytest.approx(expected[:count], rel=0.05)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_compiled_engine_judges_as_the_reference(tmp_path: Path) -> None:
    told = in_a_process(
        COMPILES_TINY.format(here=__file__), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), TMPDIR=str(tmp_path)
    )
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) < EXACT
    assert [*(tmp_path / "cache").iterdir()] != []


COMPILES_TINY = f"""
{HERE}
print(here.off(here.start(Path(), "compiled-fp32")))
"""


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_engines_judge_as_the_reference(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    told = in_a_process(
        COMPILES.format(model=str(models(family))),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        TMPDIR=str(tmp_path),
    )
    assert told.returncode == 0, told.stderr
    expected, exact, rounded = (json.loads(line) for line in told.stdout.splitlines())
    assert exact == pytest.approx(expected, rel=EXACT)
    assert rounded == pytest.approx(expected, rel=0.02)
    assert rounded != expected


COMPILES = """
from pathlib import Path
import numpy as np
from daemon.build import build_detector
images = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in (0, 1)]
for key in ("torch", "compiled-fp32", "compiled-bf16"):
    detector = build_detector(Path({model!r}), "cpu", 1, engine=key)
    assert detector.engine.startswith(key + " ")
    print([one.anomaly_score for one in detector.predict(images)])
"""


@pytest.mark.long
def test_a_missing_compiler_is_named_with_its_cure(tmp_path: Path) -> None:
    told = in_a_process(
        COMPILES_TINY.format(here=__file__),
        CXX="/absent/c++",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        TMPDIR=str(tmp_path),
    )
    assert told.returncode == 1
    assert "detectors.base.ArtifactError: compiled-fp32 could not be compiled:" in told.stderr
    assert "apt install g++ python3-dev" in told.stderr
