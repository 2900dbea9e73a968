"""Settings → objects. The only module that names every plug-in."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, assert_never

import numpy as np
import structlog

from calibration import store
from calibration.calibration import Calibration, CalibrationError
from config import schema
from config.credentials import read_credentials
from config.load import ConfigError
from daemon import images
from daemon.archive import Archive
from daemon.challenge import Challenge, ChallengeSet
from daemon.channel import Overflow
from daemon.contract import Identity
from daemon.framing import Framing, FramingError
from daemon.link import Broker, DeliveryError
from daemon.messages import Outcome
from daemon.outbox import Outbox
from daemon.pulse import Beat, unwatched
from daemon.regions import PLAIN, RegionDetector, Rule, load_mask
from daemon.retention import Limits
from daemon.sources.base import Source
from daemon.sources.folder.source import FolderSource, Order
from daemon.sources.framed import framed
from daemon.sources.genicam.session import Exposure
from daemon.sources.genicam.source import GenicamSource, Incomplete
from daemon.sources.mqtt import MqttSource
from daemon.sources.video.source import VideoSource, shown
from daemon.stats import Drop
from detectors import artifact
from detectors.base import ArtifactError, Detector, DetectorName, Image
from detectors.devices import choose
from detectors.engines.base import REFERENCE, Comparison, EngineName, Start, key
from detectors.engines.start import export, starter
from detectors.preprocess import Preprocess
from detectors.tiling import TiledDetector, Tiling, pieces, tiling_of

CALIBRATION = "calibration.json"

log = structlog.get_logger()


def build_source(
    station: schema.Station,
    framing: Framing,
    state_dir: Path,
    outbox: Outbox,
    lost: Callable[[Drop, int], None],
    broker: Callable[[], Broker],
    identity: Identity,
) -> Source:
    """Where the station's frames come from, framed; it tells `lost` what got away from it, and how many.

    Raises:
        ConfigError: options of the source do not go together.
    """
    built: Source
    match station.source:
        case schema.FolderSource() as source:
            built = FolderSource(
                station.name,
                source.path,
                concluded=outbox.concluded,
                ledger=state_dir / f"{station.name}.ledger.sqlite3" if source.keep == "leave" else None,
                settle_ms=source.settle_ms,
                give_up_s=source.give_up_s,
                rescan_s=source.rescan_s,
                order=Order(source.order),
                part_id_pattern=source.part_id_pattern,
                sidecar=source.sidecar,
                skip_duplicates=source.skip_duplicates,
                duplicate=lambda: lost(Drop.DUPLICATE, 1),
                delete=source.keep == "delete",
                shrink=framing.shrink,
            )
        case schema.GenicamSource() | schema.VideoSource() as source:
            built = build_camera(station.name, source, lost)
        case schema.MqttSource() as source:
            built = MqttSource(
                broker,
                identity,
                source.topic,
                answer_again=partial(outbox.tell_again, station.name),
                group=source.group,
                window=source.window,
                absence_s=source.absence_s,
                shrink=framing.shrink,
            )
        case _ as unknown:
            assert_never(unknown)
    return framed(built, framing, shrunk=isinstance(station.source, schema.FolderSource | schema.MqttSource))


def build_camera(
    station: str, source: schema.GenicamSource | schema.VideoSource, lost: Callable[[Drop, int], None]
) -> Source:
    """The camera or video that a station looks through, not framed yet.

    Raises:
        ConfigError: options of the source do not go together.
    """
    match source:
        case schema.GenicamSource():
            return GenicamSource(
                station,
                source.camera,
                lost=lost,
                trigger=Exposure(source.trigger),
                line=source.line,
                features=source.features,
                incomplete=Incomplete(source.incomplete),
                stall_s=source.stall_s,
            )
        case schema.VideoSource():
            try:
                return VideoSource(
                    station,
                    source.place,
                    lost=lost,
                    live=source.live,
                    width=source.width,
                    height=source.height,
                    fps=source.fps,
                    fourcc=source.fourcc,
                    stall_s=source.stall_s,
                    transport=source.transport,
                )
            except ValueError as error:
                raise ConfigError(f"station {station}: [station.source]: {error}") from error
        case _ as unknown:
            assert_never(unknown)


def place_of(source: schema.Source) -> str:
    """Which folder, camera or topic a source is, without what is secret."""
    match source:
        case schema.FolderSource():
            return str(source.path)
        case schema.GenicamSource():
            return source.camera
        case schema.VideoSource():
            return shown(source.place)
        case schema.MqttSource():
            return f"{source.topic} in group {source.group}" if source.group else source.topic
        case _ as unknown:
            assert_never(unknown)


def overflow_of(source: schema.Source) -> Overflow:
    """What becomes of parts that come faster than they are judged; those in a folder or at a broker wait."""
    if isinstance(source, schema.FolderSource | schema.MqttSource):
        return Overflow.WAIT
    return {"drop": Overflow.DROP_OLDEST, "reject": Overflow.EXCEED, "wait": Overflow.WAIT}[source.overflow]


def build_framing(framing: schema.Framing) -> Framing:
    """What is done to a station's images, with the flat field read.

    Raises:
        ConfigError: the flat field cannot be used, or not with this crop.
    """
    file = framing.flat_field
    try:
        flat_field = None if file is None else images.read(file, framing.shrink)
        return Framing(flat_field, framing.crop, framing.rotate, framing.shrink)
    except images.UndecodableError as error:
        fault = f"cannot be read as an image: {error}. Save it again as a PNG"
    except OSError as error:
        fault = f"cannot be read ({error.strerror}). Put it there, readable by the daemon's user"
    except FramingError as error:
        fault = str(error)
    raise ConfigError(f"[station.framing]: {'' if file is None else f'{file}: '}{fault}")


def build_rule(regions: schema.Regions) -> Rule:
    """Where a defect may be and how large it must be, with the masks read.

    Raises:
        ConfigError: a mask cannot be used, or no part could ever be rejected.
    """
    try:
        kept = load_mask(regions.roi, regions.ignore)
        return Rule(regions.smallest_area_px, regions.count, kept)
    except ValueError as error:
        raise ConfigError(f"[station.regions]: {error}") from error


def build_detector(
    folder: Path, device: str = "auto", threads: int = 0, rule: Rule = PLAIN, engine: str = REFERENCE
) -> Detector:
    """Load the model in `folder` onto a device and run it once, by the engine of that key; it scores under `rule`.

    Raises:
        ArtifactError: no usable model, or no such device or engine.
    """
    manifest = artifact.read_manifest(folder)
    start = starter(folder, manifest, engine, choose(device, threads), threads)
    detector = _family(folder, manifest).load(folder, manifest, start)
    if (tiling := _tiling(folder, manifest)) is not None:
        detector = TiledDetector(detector, tiling)
    detector.predict([np.zeros((256, 256, 3), np.uint8)])  # so that the first part does not pay for lazy initialisation
    return detector if rule.is_plain else RegionDetector(detector, rule)


def export_engine(folder: Path, engine: EngineName, good: Iterable[Image]) -> str:
    """Export the model in `folder` for an engine, with the ranges of good parts where it rounds; give its key.

    Raises:
        ArtifactError: no usable model, or the engine's library is missing.
    """
    manifest = artifact.read_manifest(folder)
    family = _family(folder, manifest)
    preprocess = family.preprocess_of(manifest)
    tiling = _tiling(folder, manifest)
    pictures = [preprocess.resize([piece]) for image in good for piece in pieces(image, tiling)]
    return export(folder, manifest, engine, family.load_comparison(folder, manifest), pictures)


def export_onnx(folder: Path, file: Path) -> None:
    """Write all that the model in `folder` computes as one ONNX file, for other runtimes.

    Raises:
        ArtifactError: no usable model, one that cannot be such a file, or a library that is missing.
    """
    from detectors.engines import onnx

    manifest = artifact.read_manifest(folder)
    onnx.write(file, manifest, _family(folder, manifest).load_comparison(folder, manifest))


class Family(Protocol):
    """What the modules of the detectors have in common."""

    def load(self, folder: Path, manifest: artifact.Manifest, start: Start) -> Detector:
        """Run a saved model on the engine that `start` gives."""

    def load_comparison(self, folder: Path, manifest: artifact.Manifest) -> Comparison:
        """What an engine is to compute of it."""

    def preprocess_of(self, manifest: artifact.Manifest) -> Preprocess:
        """What is done to its images."""


def _tiling(folder: Path, manifest: artifact.Manifest) -> Tiling | None:
    with artifact.usable(folder, manifest):
        return tiling_of(manifest.settings)


def _name(folder: Path, manifest: artifact.Manifest) -> DetectorName:
    try:
        return DetectorName(manifest.detector)
    except ValueError:
        raise ArtifactError(
            f"{folder} was trained by the detector {manifest.detector!r}, which this version does not know; "
            "install the version that trained it, or train again"
        ) from None


def _family(folder: Path, manifest: artifact.Manifest) -> Family:
    match _name(folder, manifest):
        case DetectorName.gsk_rd4ad | DetectorName.sk_rd4ad | DetectorName.rd4ad | DetectorName.rdpp:
            from detectors.reverse_distillation import detector as reverse_distillation

            return reverse_distillation
        case DetectorName.efficientad_s | DetectorName.efficientad_m | DetectorName.puad:
            from detectors.efficientad import detector as efficientad

            return efficientad
        case DetectorName.patchcore:
            from detectors import patchcore

            return patchcore
        case _ as unknown:
            assert_never(unknown)


def engine_of(calibration: Calibration, asked: str = "auto") -> str:
    """The key of the engine that inspects: the one whose scores the calibration was made of.

    Raises:
        CalibrationError: another engine is asked for.
    """
    made = key(calibration.provenance.engine)
    if asked not in {"auto", made.partition("/")[0]}:
        raise CalibrationError(
            f'calibration {calibration.id} was made with the engine {made}, and engine = "{asked}" is asked for: '
            f"calibrate with that one (`inspectd export --engine {asked}`; the reference: `inspectd calibrate --engine "
            f'{REFERENCE}`), or set engine = "auto"'
        )
    return made


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of the model in `folder`, which is not loaded.

    Raises:
        ArtifactError: there is no model, or none that this version knows.
    """
    manifest = artifact.read_manifest(folder)
    _name(folder, manifest)
    return manifest.fingerprint


def load_calibration(folder: Path, detector: Detector) -> Calibration:
    """The calibration beside a model that inspects everything, however its images were framed.

    Raises:
        CalibrationError: none, torn, edited, another model's, or made with region rules.
    """
    return store.load(folder / CALIBRATION, detector.fingerprint, framing=None)


def build_challenge(challenge: schema.Challenge, station: str, state_dir: Path) -> Challenge:
    """The challenge test of a station, with its last result."""
    parts = ChallengeSet(
        challenge.name,
        frozenset(challenge.good),
        frozenset(challenge.bad),
        timedelta(hours=challenge.every_h),
        timedelta(minutes=challenge.within_min),
    )
    return Challenge(parts, station, state_dir, holds_station=challenge.holds_station)


def build_archive(archive: schema.Archive, beat: Beat = unwatched) -> Archive:
    """Where images are kept; a folder that cannot be used is its own trouble, and no error here."""
    gigabytes = {
        Outcome.FAIL: archive.fail_gb,
        Outcome.UNCERTAIN: archive.uncertain_gb,
        Outcome.ERROR: archive.error_gb,
        Outcome.PASS: archive.pass_gb,
    }
    quota = {outcome: int(size * 1e9) for outcome, size in gigabytes.items()}
    limits = Limits(quota, archive.days, int(archive.free_gb * 1e9))
    return Archive(archive.path, limits, archive.format, archive.pass_every, beat=beat)


def build_broker(mqtt: schema.Mqtt) -> Callable[[], Broker]:
    """Where to publish, with the password and the certificates read from their files each time it is asked.

    What it gives raises DeliveryError while a file is at fault: one that is being replaced may be torn.

    Raises:
        ConfigError: with the faults of all these files now.
    """
    read_credentials(mqtt)
    if mqtt.tls is not None and not mqtt.tls.verify_host_name:
        log.warning(
            "the broker's certificate need not name its host: whoever has any certificate from ca_file can pose as the "
            "broker; have one made for the host and take verify_host_name away",
            broker=mqtt.host,
        )

    def read() -> Broker:
        try:
            credentials = read_credentials(mqtt)
        except ConfigError as error:
            faults = " ".join(str(error).splitlines())
            raise DeliveryError(f"broker {mqtt.host}:{mqtt.port} cannot be asked: {faults}") from None
        return Broker(
            host=mqtt.host,
            port=mqtt.port,
            protocol=mqtt.protocol,
            username=mqtt.username,
            password=credentials.password,
            keepalive_s=mqtt.keepalive_s,
            tls=credentials.tls,
        )

    return read
