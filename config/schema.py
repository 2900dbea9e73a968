"""Every option: its name in the file, type, bounds, default and description. Frozen; unknown options are refused.

The descriptions are the documentation: the sample file repeats them word for word.
"""

import ipaddress
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

TLS_PORT = 8883
"""Where brokers listen for TLS, as registered for MQTT."""


_TOPIC_BYTES = 1024

MOST_VIEWS = 8
"""So many fit into a verdict."""

DEFAULT_RECIPE = "default"
"""What the recipe of a station is called that has just one, unnamed."""


def is_loopback(host: str) -> bool:
    """Whether what is sent to this host never leaves the machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def clean_name(text: str) -> str:
    """Make any text a name: what is not a letter, digit, - or _ becomes -, and 32 characters are kept."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:32].strip("-") or "node"


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", text):
        raise ValueError("is not a name. Use 1 to 32 letters, digits, - and _, without spaces.")
    return text


def _topic_prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}(/[A-Za-z0-9_-]{1,32}){0,5}", text):
        raise ValueError(
            "is not a topic prefix. Use 1 to 6 levels joined by single slashes, each of 1 to 32 letters, digits, "
            '- and _, with no slash at either end and no wildcard + or #, like "plant/line1".',
        )
    return text


def _topic_filter(text: str) -> str:
    if (
        not re.fullmatch(r"(?!\$)(([^+#\0/]*|\+)/)*([^+#\0/]*|[+#])", text)
        or not 0 < len(text.encode()) <= _TOPIC_BYTES
    ):
        raise ValueError(
            "is not a topic to subscribe to. Write levels joined by slashes, where + stands for any one and # at the "
            'end for all further, without $ at the front, like "lines/+/images".',
        )
    return text


def _group(text: str) -> str:
    return _name(text) if text else text


def _host(text: str) -> str:
    # An IPv6 address has two colons or more; a single one separates a port.
    if not re.fullmatch(r"[^\s/]{1,253}", text) or text.count(":") == 1:
        raise ValueError(
            "is not a host. Give the name or address alone, without mqtt:// or spaces; the port is another option.",
        )
    return text


class _Missing:
    """Stands where an option must be that others could have made needless."""


def _from_folder(value: object, info: ValidationInfo) -> object:
    if isinstance(value, _Missing):
        raise PydanticCustomError("missing", "an option that others could have made needless")
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("is not a path. Name a file or folder, in quotes.")
    if isinstance(value, str | Path):
        return Path(info.context["folder"] if info.context else "", value)
    return value


def _pattern(text: str) -> str:
    try:
        groups = re.compile(text).groupindex
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}.") from None
    if text and "part" not in groups:
        raise ValueError('has no group named part. Write one, like "(?P<part>SN-[0-9]+)".')
    return text


def _part_id(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]{1,64}", value):
        raise ValueError(
            "is not a part id. Write it as verdicts have it, 1 to 64 letters, digits, dots, - and _, in quotes: "
            "the file name without its suffix.",
        )
    return value


def _listed(value: object) -> object:
    # TOML has no tuples; pydantic's own words for what is neither would be those for a section.
    if not isinstance(value, list | tuple):
        raise ValueError('is not a list. Write one between brackets, like ["LS-01", "LS-02"].')  # noqa: TRY004 -- pydantic catches no other
    if not value:
        raise ValueError("without parts proves nothing. Name at least one part.")
    return tuple(value)


def _each_once(parts: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [part for number, part in enumerate(parts) if part in parts[:number]]:
        raise ValueError(f'names "{twice[0]}" twice. Name each part once.')
    return parts


def _shifts(value: object) -> object:
    # TOML has no tuples, and its own times need seconds.
    times = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(time, str) and re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", time) for time in times):
        raise ValueError('is no list of times. Write hours and minutes, in quotes, like ["06:00", "14:00", "22:00"].')
    if len(set(times)) < len(times):
        raise ValueError("names a time twice. Name each time once.")
    return tuple(times)


def _crop(value: object) -> object:
    # TOML has no tuples; True and False are integers to Python alone.
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) != 4 or any(type(number) is not int for number in numbers):  # noqa: PLR2004 -- x, y, width, height
        raise ValueError("is no crop. Write four whole numbers, [x, y, width, height].")
    if min(numbers[:2]) < 0 or min(numbers[2:]) < 1 or max(numbers) > 65_536:  # noqa: PLR2004 -- no camera sees more
        raise ValueError("is no crop. Give x and y from 0, width and height from 1, in pixels.")
    return tuple(numbers)


def _shrink(value: object) -> object:
    if type(value) is not int or value not in {1, 2, 4, 8}:
        raise ValueError("is no such share. Write 1, 2, 4 or 8, without quotes.")
    return value


def _turn(value: object) -> object:
    if type(value) is not int or value not in {0, 90, 180, 270}:
        raise ValueError("is no such turn. Write 0, 90, 180 or 270, without quotes.")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""1 to 32 letters, digits, - and _: fit for a topic level, a client id and a file name."""

PartIds = Annotated[
    tuple[Annotated[str, BeforeValidator(_part_id)], ...],
    BeforeValidator(_listed),
    AfterValidator(_each_once),
]
"""Ids of parts as the folder source makes them, at least one, each once."""

ConfiguredPath = Annotated[Path, BeforeValidator(_from_folder)]
"""A path that starts at the `folder` of the validation context, unless it is absolute or there is no context."""


Overflow = Literal["drop", "reject", "wait"]

_OVERFLOW = 'Parts that come too fast: "drop" the oldest, "reject" the newest with ERROR, or let the camera "wait".'
_STALL = "Seconds without a frame after which the camera counts as dead; longer than the time between two."


class Section(BaseModel):
    """What all sections share: nothing is converted in silence, nothing unknown is accepted, nothing changes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Tls(Section):
    """How the broker and the daemon prove who they are. The files are read with `credentials.read_tls`."""

    ca_file: ConfiguredPath | None = Field(
        default=None,
        description="Certificates (PEM) of the authorities that may vouch for the broker; default: the system's.",
    )
    certificate_file: ConfiguredPath | None = Field(
        default=None,
        description="Certificate (PEM) of the daemon, with those between it and the authority; default: none.",
    )
    key_file: ConfiguredPath | None = Field(
        default=None,
        description="Its private key (PEM, without a password); default: the systemd credential mqtt_key, if there.",
    )
    verify_host_name: bool = Field(
        default=True,
        description="Whether the broker's certificate must name the host; false is taken only beside ca_file.",
    )

    @field_validator("key_file")
    @classmethod
    def _belongs_to_a_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        # A file that is itself at fault is absent from the data; one fault is enough then. So below.
        if "certificate_file" in info.data:
            certificate = info.data["certificate_file"]
            if key is None and certificate is not None:
                raise PydanticCustomError("missing", "a certificate without its key")
            if key is not None and certificate is None:
                raise ValueError(
                    f"names {key}, but there is no certificate. "
                    'Add certificate_file = "…" to [mqtt.tls] or take the key away.',
                )
        return key

    @field_validator("verify_host_name")
    @classmethod
    def _trusts_few_at_least(cls, verify: bool, info: ValidationInfo) -> bool:  # noqa: FBT001 -- pydantic's call
        if not verify and info.data.get("ca_file", "") is None:
            raise ValueError(
                "would trust every certificate that any of the system's authorities has signed. "
                'Add ca_file = "…" to [mqtt.tls], or take verify_host_name away.',
            )
        return verify


class Mqtt(Section):
    """The broker and what is sent to it. What is secret is read with `credentials`, and never kept here."""

    host: Annotated[str, AfterValidator(_host)] = Field(description="Name or address of the MQTT broker.")
    port: int = Field(
        default=1883, ge=1, le=65535, description="TCP port of the broker; default with [mqtt.tls]: 8883."
    )
    topic_prefix: Annotated[str, AfterValidator(_topic_prefix)] = Field(
        default="inspectd",
        description="First levels of every topic, 1 to 6 joined by slashes; the name of the station follows them.",
    )
    protocol: Literal["auto", "5", "3.1.1"] = Field(
        default="auto",
        description='MQTT version: "5", "3.1.1", or "auto" for 5 with a fall back to 3.1.1.',
    )
    username: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="User name of the broker account; without it the daemon signs in anonymously.",
    )
    password_file: ConfiguredPath | None = Field(
        default=None,
        description="File with the password of that account; default: the systemd credential mqtt_password, if there.",
    )
    allow_plain: bool = Field(
        default=False,
        description="Whether a broker on another machine may be spoken to without [mqtt.tls], readable on the way.",
    )
    keepalive_s: int = Field(
        default=10,
        ge=5,
        le=3600,
        description="Seconds between signs of life; the broker reports the daemon lost after 1.5 times this.",
    )
    overlays: Literal["rejects", "all", "none"] = Field(
        default="rejects",
        description='Parts of which an overlay picture is sent: "rejects" (all that did not pass), "all" or "none".',
    )
    overlay_side: int = Field(
        default=512,
        ge=64,
        le=2048,
        description="Length of the longer side of overlay pictures, in pixels.",
    )
    maps: bool = Field(
        default=False,
        description="Whether the anomaly map is sent beside each overlay, as a PNG to compute with.",
    )
    sources: bool = Field(
        default=False,
        description="Whether the image itself is sent beside each overlay.",
    )
    tags: bool = Field(
        default=False,
        description="Whether the newest verdict is sent as plain values too, for those who read no JSON.",
    )
    actuation_ttl_s: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="Seconds after which a message to the reject gate is too old to act on.",
    )
    max_packet_bytes: int = Field(
        default=1_000_000,
        ge=4096,
        le=268_435_455,
        description="Largest MQTT packet that is sent, in bytes; pictures are shrunk to fit.",
    )
    outbox_max_rows: int = Field(
        default=1_000_000,
        ge=1000,
        le=100_000_000,
        description="Verdicts kept for a broker that is away; beyond, the oldest that passed are dropped, then others.",
    )
    replay_rate: int = Field(
        default=200,
        ge=1,
        le=100_000,
        description="Verdicts a second that are sent late after a break, beside the new ones.",
    )
    tls: Tls | None = Field(
        default=None,
        description="TLS, 1.2 or later; without this section nothing is encrypted and nobody proves who he is.",
    )

    @model_validator(mode="before")
    @classmethod
    def _port_of_tls(cls, options: object) -> object:
        if isinstance(options, dict) and options.get("tls") is not None:
            return {"port": TLS_PORT, **options}
        return options

    @field_validator("password_file")
    @classmethod
    def _belongs_to_a_user(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        # A username that is itself at fault is absent from the data; one fault is enough then.
        if file is not None and info.data.get("username", "") is None:
            raise ValueError(f'names {file}, but there is no user. Add username = "…" to [mqtt] or take the file away.')
        return file

    @field_validator("tls")
    @classmethod
    def _plain_stays_here(cls, tls: Tls | None, info: ValidationInfo) -> Tls | None:
        # A host or permission that is itself at fault is absent from the data; one fault is enough then.
        host, allowed = info.data.get("host"), info.data.get("allow_plain", True)
        if tls is None and host is not None and not allowed and not is_loopback(host):
            raise PydanticCustomError("plain", "a broker elsewhere without TLS", {"host": host})
        return tls


class Metrics(Section):
    """Where Prometheus reads the figures."""

    host: Annotated[str, AfterValidator(_host)] = Field(
        default="127.0.0.1",
        description="Address to listen at; other machines read any but this one without TLS or a password.",
    )
    port: int = Field(default=9464, ge=1, le=65535, description="TCP port to listen at.")


class Archive(Section):
    """Where images of parts are kept for people, and how many."""

    path: ConfiguredPath = Field(description="Folder for the images of all stations, of this daemon alone.")
    format: Literal["png", "jpeg"] = Field(
        default="png",
        description='How images are kept: "png" as they were judged, "jpeg" in a fifth of that, with a little lost.',
    )
    fail_gb: float = Field(default=50.0, ge=0, le=1e6, description="GB that parts with FAIL may take; 0 keeps none.")
    uncertain_gb: float = Field(
        default=10.0, ge=0, le=1e6, description="GB that parts with UNCERTAIN may take; 0 keeps none."
    )
    error_gb: float = Field(default=5.0, ge=0, le=1e6, description="GB that parts with ERROR may take; 0 keeps none.")
    pass_gb: float = Field(default=5.0, ge=0, le=1e6, description="GB that parts with PASS may take; 0 keeps none.")
    pass_every: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Of parts that pass one in so many is kept, on average; 0 keeps none.",
    )
    days: int = Field(
        default=0, ge=0, le=36_500, description="Days after which an image is removed, reviewed or not; 0 for never."
    )
    free_gb: float = Field(
        default=5.0, ge=0, le=1e6, description="GB that stay free on the disk; images are removed for it, or not kept."
    )


class FolderSource(Section):
    """Parts arrive as image files in a folder."""

    type: Literal["folder"] = Field(description='Where images come from: "folder" watches a folder for image files.')
    path: ConfiguredPath = Field(description="Folder to watch; each station has its own.")
    keep: Literal["move", "delete", "leave"] = Field(
        default="move",
        description='Judged files: "move" puts them into done/, "delete" removes them, "leave" changes nothing at all.',
    )
    order: Literal["arrival", "name"] = Field(
        default="arrival",
        description='Which file is taken first: "arrival", the oldest, or "name", img2 before img10.',
    )
    part_id_pattern: Annotated[str, AfterValidator(_pattern)] = Field(
        default="",
        description="Regular expression in file names with a group part, the id, maybe a group batch, others for meta.",
    )
    sidecar: bool = Field(
        default=False,
        description="Whether beside each image lies NAME.json with part_id, batch_id and meta, which it waits for.",
    )
    skip_duplicates: bool = Field(
        default=False,
        description="Whether a file with the content of one of the last 1,000 parts gets no verdict of its own.",
    )
    settle_ms: int = Field(
        default=200,
        ge=0,
        le=60_000,
        description="Milliseconds for which a file must stay unchanged, if its writer was not seen to close it.",
    )
    give_up_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Seconds after which a file that cannot be read is given up with the outcome ERROR.",
    )
    rescan_s: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="Seconds between two listings of the folder, which find what file-system events missed.",
    )


class GenicamSource(Section):
    """Parts are seen by a GigE Vision or USB3 Vision camera."""

    type: Literal["genicam"] = Field(description='Where images come from: "genicam", a GigE Vision or USB3 camera.')
    camera: str = Field(min_length=1, max_length=128, description="Its serial number, user-defined name or IP address.")
    trigger: Literal["free", "hardware", "software"] = Field(
        default="free",
        description='What exposes: "free", the camera; "hardware", its line; "software", inspectd for each part.',
    )
    line: str = Field(default="Line0", min_length=1, max_length=64, description='Input that triggers it on "hardware".')
    incomplete: Literal["reject", "drop"] = Field(
        default="reject",
        description='Frames with missing packets: "reject" gives a verdict ERROR, "drop" counts them and goes on.',
    )
    overflow: Overflow = Field(default="reject", description=_OVERFLOW)
    stall_s: float = Field(default=1.0, ge=0.2, le=3600, description=_STALL)
    features: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="Features of the camera, set in this order before it starts.",
    )


class VideoSource(Section):
    """Parts are seen by a USB camera or an IP camera, or were recorded."""

    type: Literal["video"] = Field(description='Where images come from: "video", a USB or IP camera or a recording.')
    place: str = Field(
        min_length=1,
        max_length=1024,
        description="V4L2 device (/dev/video0), URL (rtsp://…), video file, or images like part_%04d.png.",
    )
    live: bool | None = Field(
        default=None,
        description="Whether it goes on by itself and is watched for stalls; default: true for devices and URLs.",
    )
    width: int | None = Field(default=None, ge=1, le=65_536, description="Width asked of a device, in pixels.")
    height: int | None = Field(default=None, ge=1, le=65_536, description="Height asked of a device, in pixels.")
    fps: float | None = Field(default=None, gt=0, le=10_000, description="Frames a second asked of a device.")
    fourcc: str | None = Field(default=None, min_length=4, max_length=4, description="Pixel format asked of a device.")
    transport: Literal["tcp", "udp"] = Field(default="tcp", description="How RTSP brings its packets.")
    overflow: Overflow = Field(default="drop", description=_OVERFLOW)
    stall_s: float = Field(default=1.0, ge=0.2, le=3600, description=_STALL)


class MqttSource(Section):
    """Parts arrive as MQTT messages at the broker of [mqtt], each answered there."""

    type: Literal["mqtt"] = Field(description='Where images come from: "mqtt", messages with an image file in each.')
    topic: Annotated[str, AfterValidator(_topic_filter)] = Field(
        description="Where they are published, outside of topic_prefix; + and # are wildcards.",
    )
    group: Annotated[str, AfterValidator(_group)] = Field(
        default="",
        description="Name in common of the daemons that share these images, each image going to one; default: none.",
    )
    window: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Images that the broker may send before the first has its verdict, by MQTT 5; mind docs/mqtt.md.",
    )
    absence_s: int = Field(
        default=3600,
        ge=1,
        le=31_536_000,
        description="Seconds for which the broker keeps images for this daemon while it is away, by MQTT 5.",
    )


Source = Annotated[FolderSource | GenicamSource | VideoSource | MqttSource, Field(discriminator="type")]
"""Every kind of source, told apart by `type`."""


class Framing(Section):
    """What is done to each image before anything else sees it. The flat field is an image, not looked at here."""

    shrink: Annotated[Literal[1, 2, 4, 8], BeforeValidator(_shrink)] = Field(
        default=1,
        description="By what width and height of images are divided before all else, 1, 2, 4 or 8; more is quicker.",
    )
    flat_field: ConfiguredPath | None = Field(
        default=None,
        description="Image of an evenly lit white surface, as large as the source's; it evens the light out.",
    )
    crop: Annotated[tuple[int, int, int, int], BeforeValidator(_crop)] | None = Field(
        default=None,
        description="What is kept, [x, y, width, height] in pixels of the source's image, shrunk; default: all.",
    )
    rotate: Annotated[Literal[0, 90, 180, 270], BeforeValidator(_turn)] = Field(
        default=0,
        description="By how many degrees clockwise what is kept is turned: 0, 90, 180 or 270.",
    )


class Challenge(Section):
    """The challenge test of a station: a set of known parts that must be judged rightly once in a while."""

    name: str = Field(min_length=1, max_length=64, description="Name of the set, as it stands on its box.")
    good: PartIds = Field(description="Part ids of its good parts, which must pass: file names without suffix.")
    bad: PartIds = Field(description="Part ids of its bad parts, none of which may pass.")
    every_h: float = Field(
        default=8.0,
        gt=0,
        le=8760,
        description="Hours after which the test is due again.",
    )
    within_min: float = Field(
        default=30.0,
        gt=0,
        le=1440,
        description="Minutes from the first part in which all parts of the set must have come.",
    )
    holds_station: bool = Field(
        default=False,
        description="Whether a failed test takes the station out of Ready: others are rejected until the set passes.",
    )

    @field_validator("bad")
    @classmethod
    def _not_good_too(cls, bad: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        # Good parts that are themselves at fault are absent from the data; one fault is enough then.
        if both := [part for part in bad if part in info.data.get("good", ())]:
            raise ValueError(f'names "{both[0]}", which is among the good parts. Take it out of one of the two.')
        return bad


class Regions(Section):
    """What it takes to reject a part. The masks are images, which are not looked at here."""

    smallest_area_px: float = Field(
        default=0.0,
        ge=0,
        le=100_000_000,
        description="Smallest defect that counts, in pixels of the image; 0 lets every one count.",
    )
    count: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="How many such defects it takes to reject a part; one several times that size is several.",
    )
    roi: ConfiguredPath | None = Field(
        default=None,
        description="Mask as large as the images, white where parts are inspected; default: everywhere.",
    )
    ignore: ConfiguredPath | None = Field(
        default=None,
        description="Mask as large as the images, white where parts are not inspected; default: nowhere.",
    )

    @field_validator("count")
    @classmethod
    def _counts_a_size(cls, count: int, info: ValidationInfo) -> int:
        # An area that is itself at fault is absent from the data; one fault is enough then.
        if count > 1 and info.data.get("smallest_area_px", 1) == 0:
            raise ValueError(
                "cannot be counted without a size. Add smallest_area_px = … to [station.regions] or take count away.",
            )
        return count


class Recipe(Section):
    """What one kind of part is judged by."""

    name: Name = Field(description="Name of the recipe, as commands and verdicts call it: letters, digits, - and _.")
    model: ConfiguredPath = Field(description="Model folder.")
    calibration: ConfiguredPath | None = Field(
        default=None,
        description="Calibration file; default: calibration.json in the model folder.",
    )
    regions: Regions = Field(
        default_factory=Regions,
        description="Where a defect may be and how large it must be; after a change, calibrate again.",
    )
    challenge: Challenge | None = Field(
        default=None,
        description="The challenge test, with parts known to be good or bad; without this section there is none.",
    )

    @property
    def calibration_file(self) -> Path:
        """Where the calibration lies: its own, or the one beside the model."""
        return self.calibration or self.model / "calibration.json"


class Station(Section):
    """One place on the line where a part is looked at."""

    name: Name = Field(description="Name of the station, as it appears in topics: letters, digits, - and _.")
    model: ConfiguredPath | None = Field(
        default=None,
        description="Model folder of the station; for several kinds of parts, add sections [[station.recipe]] instead.",
    )
    calibration: ConfiguredPath | None = Field(
        default=None,
        description="Calibration file of this station; default: calibration.json in the model folder.",
    )
    mode: Literal["continuous", "triggered"] = Field(
        default="continuous",
        description='What is judged at first: "continuous", every part that comes; "triggered", one for each trigger.',
    )
    trigger_timeout_s: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="Seconds that a trigger waits for its part; then its verdict is ERROR.",
    )
    acknowledge: bool = Field(
        default=False,
        description="Whether results of triggers must be acknowledged; with 8 unacknowledged no trigger is accepted.",
    )
    recipes_held: int = Field(
        default=8,
        ge=1,
        le=1000,
        description="Recipes kept in memory, those prepared last; a change to another one takes as long as loading it.",
    )
    source: Source = Field(description="Where the images of the station come from.")
    framing: Framing = Field(
        default_factory=Framing,
        description="What is done to each image before anything else sees it; after a change, calibrate again.",
    )
    regions: Regions = Field(
        default_factory=Regions,
        description="Where a defect may be and how large it must be; after a change, calibrate again.",
    )
    challenge: Challenge | None = Field(
        default=None,
        description="The challenge test, with parts known to be good or bad; without this section there is none.",
    )
    own_recipes: tuple[Recipe, ...] = Field(
        alias="recipe",
        default=(),
        strict=False,
        description="The kinds of parts, one section each, instead of one model; the first is prepared at first.",
    )

    @model_validator(mode="before")
    @classmethod
    def _judges_by_something(cls, options: object) -> object:
        if isinstance(options, dict) and not options.get("recipe"):
            return {"model": _Missing(), **options}
        return options

    @field_validator("own_recipes")
    @classmethod
    def _by_these_alone(cls, recipes: tuple[Recipe, ...], info: ValidationInfo) -> tuple[Recipe, ...]:
        alone = {"model": None, "calibration": None, "challenge": None, "regions": Regions()}
        beside = [option for option, none in alone.items() if info.data.get(option, none) != none]
        if recipes and beside:
            raise PydanticCustomError("beside", "recipes and something else", {"others": ", ".join(beside)})
        names = [recipe.name for recipe in recipes]
        if twice := {name for name in names if names.count(name) > 1}:
            raise PydanticCustomError("twice", "a name twice", {"twice": min(twice)})
        return recipes

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What its parts are judged by, at least one; the only one of a station without recipes is called default."""
        if self.own_recipes:
            return self.own_recipes
        alone = {"name": DEFAULT_RECIPE, "model": self.model, "calibration": self.calibration}
        return (Recipe.model_validate({**alone, "regions": self.regions, "challenge": self.challenge}),)


def _names(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError('is not a list. Write one between brackets, like ["top", "side"].')  # noqa: TRY004 -- pydantic catches no other
    return tuple(value)


def _several(views: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(views)) != len(views) or not 1 < len(views) <= MOST_VIEWS:
        raise ValueError(f"are no views of one part. Name 2 to {MOST_VIEWS} stations, each once.")
    return views


class Group(Section):
    """Stations that see one part from several sides, whose verdicts become one: the worst."""

    name: Name = Field(description="Name of the group, as it appears in topics; different from every station's.")
    views: Annotated[tuple[Name, ...], BeforeValidator(_names), AfterValidator(_several)] = Field(
        description="Names of its stations, 2 to 8; a station is in one group at most.",
    )
    by: Literal["part_id", "trigger_id"] = Field(
        default="part_id",
        description='What the views of one part have in common: "part_id", or the "trigger_id" of their triggers.',
    )
    within_s: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="Seconds from the arrival of a part's first view in which all must be judged; else it is an ERROR.",
    )


def _at_least_one(stations: tuple[Station, ...]) -> tuple[Station, ...]:
    # pydantic's own `min_length` would count only stations without fault.
    if not stations:
        raise ValueError("without stations. Add a section [[station]].")
    return stations


class Settings(Section):
    """The whole file. Made by `load.load`, which alone checks the stations against each other."""

    node: Name = Field(
        default_factory=lambda: clean_name(socket.gethostname()),
        description="Name of this machine, different from every other on the broker; default: the host name.",
    )
    state_dir: ConfiguredPath = Field(
        default=Path("state"),
        description="Folder for what must outlive a restart; default: that of systemd, else state beside this file.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description='Where models run: "cpu", "cuda" (an NVIDIA GPU), or "auto" for a GPU if there is one.',
    )
    engine: Literal[
        "auto",
        "torch",
        "openvino-fp32",
        "openvino-bf16",
        "openvino-mixed",
        "openvino-int8",
        "onnxruntime-fp32",
        "compiled-fp32",
        "compiled-bf16",
        "cudagraph-bf16",
    ] = Field(
        default="auto",
        description='What runs the networks; "auto": what each calibration was made with, others are refused.',
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="CPU threads for one inference; 0 leaves the choice to the library.",
    )
    shifts: Annotated[tuple[str, ...], BeforeValidator(_shifts)] = Field(
        default=(),
        description="Local times at which a shift begins, and its figures with it; default: when reset_stats says so.",
    )
    mqtt: Mqtt = Field(description="The broker and what is sent to it.")
    metrics: Metrics | None = Field(
        default=None,
        description="The figures for Prometheus, read over HTTP; without this section none are kept.",
    )
    archive: Archive | None = Field(
        default=None,
        description="Images kept on disk for people to look at; without this section there are none.",
    )
    # A list is accepted because TOML has no other sequence; each station in it is strict all the same.
    stations: Annotated[tuple[Station, ...], AfterValidator(_at_least_one)] = Field(
        alias="station",
        strict=False,
        description="The stations, one section each.",
    )
    groups: tuple[Group, ...] = Field(
        alias="group",
        default=(),
        strict=False,
        description="Stations that see one part from several sides and give it one verdict, one section a group.",
    )


def options(model: type[BaseModel] = Settings, above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every section and option by its dotted key in the file (`mqtt`, `mqtt.port`, …), in the file's order.

    Where a section is of one of several kinds, it comes once for each kind, with what the kind is.
    """
    for name, field in model.model_fields.items():
        key = above + (field.alias or name)
        for number, inner in enumerate(_models(field.annotation)):
            yield key, field if number == 0 else FieldInfo(annotation=inner, description=inner.__doc__)
            yield from options(inner, f"{key}.")
        if not list(_models(field.annotation)):
            yield key, field


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
