"""A calibration survives its file, and a file that cannot be trusted is refused with its reason."""

import json
import math
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.calibration import Appearance, Calibration, CalibrationError, Provenance, fit, named
from calibration.store import accept, earlier, history, install, load, proposal, propose, read, save, write_whole
from calibration.threshold import Method

NOON = datetime(2026, 3, 4, 12, 0, 0, 123456, tzinfo=UTC)
PROVENANCE = Provenance("model-a", "d" * 64, NOON, engine="cpu", regions="", made_by="Ann")


def made(
    n: int = 120,
    *,
    model: str = "model-a",
    regions: str = "",
    framing: str = "",
    method: Method | None = None,
    size: int = 1,
    fail_alpha: float | None = None,
    appearance: Appearance | None = None,
) -> Calibration:
    """Calibrate with `n` parts, each seen `size` times."""
    return fit(
        np.repeat(np.random.default_rng(n).gumbel(3, 0.5, n), size),
        alpha=0.01,
        provenance=replace(PROVENANCE, model=model, regions=regions, framing=framing),
        method=method,
        groups=[f"part{number}" for number in np.repeat(np.arange(n), size)] if size > 1 else (),
        fail_alpha=fail_alpha,
        appearance=appearance,
    )


def edit(path: Path, **values: object) -> None:
    document: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(document | values))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calibration.json"


@pytest.mark.parametrize("n", [1, 31, 99, 1000])
def test_what_is_saved_is_loaded_again_to_the_last_bit(path: Path, n: int) -> None:
    calibration = made(n)
    save(calibration, path)
    assert load(path, "model-a") == read(path) == calibration


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("size", [1, 3])
def test_every_method_with_and_without_groups_survives_its_file(path: Path, method: Method, size: int) -> None:
    looks = Appearance({"brightness": (0.1, 1 / 3), "sharpness": (2e-308, 1e300)}, "cGljdHVyZQ==")
    calibration = made(320, method=method, size=size, appearance=looks)
    save(calibration, path)
    assert load(path, "model-a") == calibration


@pytest.mark.parametrize("n", [10, 40, 120, 350])
def test_a_band_survives_its_file(path: Path, n: int) -> None:
    calibration = made(n, fail_alpha=0.001)
    save(calibration, path)
    assert load(path, "model-a") == calibration


def test_saving_leaves_nothing_but_the_file(path: Path) -> None:
    save(made(), path)
    save(made(200), path)
    assert list(path.parent.iterdir()) == [path]
    assert load(path, "model-a") == made(200)


def test_a_failed_save_leaves_no_temporary_file_behind(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError, match=r"calibration\.json"):
        save(made(), path)
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_meets_a_whole_file_while_another_is_saved(path: Path) -> None:
    one, other = made(99), made(600)
    save(one, path)
    stop = threading.Event()

    def keep_saving() -> None:
        while not stop.is_set():
            save(other, path)
            save(one, path)

    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        met = {load(path, "model-a").id for _ in range(60)}
    finally:
        stop.set()
        writer.join()
    assert met <= {one.id, other.id}


def test_a_missing_file_says_what_to_run(path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration; run `inspectd calibrate`"):
        load(path, "model-a")


def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(path, "model-a")


def test_a_file_torn_at_any_byte_is_refused(path: Path) -> None:
    save(made(5), path)
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CalibrationError, match="torn"):
            load(path, "model-a")


@pytest.mark.parametrize("noise", [b"\x00" * 512, b"\xff\xfe\x00", b"{}}"])
def test_a_file_of_noise_is_refused(path: Path, noise: bytes) -> None:
    path.write_bytes(noise)
    with pytest.raises(CalibrationError, match="torn or not JSON"):
        load(path, "model-a")


@pytest.mark.parametrize("document", ["[]", "3", "{}", '{"schema": "inspectd.calibration/1"}'])
def test_an_unknown_version_is_refused(path: Path, document: str) -> None:
    path.write_text(document)
    with pytest.raises(CalibrationError, match=r"is unknown, 'inspectd\.calibration/2' is read here"):
        load(path, "model-a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", "000000000000"),
        ("threshold", 1000.0),
        ("threshold", "high"),
        ("threshold", math.nan),
        ("alpha", 0.02),
        ("alpha", "0.01"),
        ("alpha", True),
        ("confidence", 0.9),
        ("confidence", 2),
        ("asked", "tail"),
        ("asked", "guess"),
        ("method", "tolerance"),
        ("why", "because"),
        ("n_effective", 400),
        ("rank", 1),
        ("rank_effective", 1),
        ("fail_alpha", 0.001),
        ("fail_alpha", 0.5),
        ("fail_method", "tail"),
        ("fail_threshold", 1000.0),
        ("tail", None),
        ("tail", {"location": 1.0, "scale": 1.0, "shape": 0.0}),
        ("tail", {"place": 1.0}),
        ("tail", 3),
        ("scores", [1.0, 2.0]),
        ("scores", []),
        ("scores", {"a": 1}),
        ("scores", ["one"]),
        ("scores", [10**400]),
        ("scores", [math.nan]),
        ("groups", [0]),
        ("groups", list(range(120))),
        ("groups", ["one"] * 120),
        ("groups", 5),
        ("appearance", {"canaries": {"brightness": [0.5]}, "thumbnail": ""}),
        ("appearance", {"canaries": {}}),
        ("appearance", "bright"),
        ("provenance", {}),
        ("provenance", "model-a"),
        ("note", "an unknown key"),
    ],
)
def test_an_edited_file_is_refused(path: Path, key: str, value: object) -> None:
    save(made(), path)
    edit(path, **{key: value})
    for model in ("model-a", "model-b"):
        with pytest.raises(CalibrationError, match="edited"):
            load(path, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "model-b"),
        ("data_sha256", "e" * 64),
        ("engine", "cuda"),
        ("regions", "mask-2"),
        ("framing", "frame-2"),
        ("made_by", "Bob"),
        ("made_at", "2027-03-04T12:00:00+00:00"),
        ("made_at", "2026-03-04T12:00:00"),
        ("made_at", "today"),
        ("made_at", 5),
        ("note", "an unknown key"),
    ],
)
def test_an_edited_provenance_is_refused(path: Path, key: str, value: object) -> None:
    save(made(), path)
    edit(path, provenance=json.loads(path.read_text())["provenance"] | {key: value})
    for model in ("model-a", "model-b"):
        with pytest.raises(CalibrationError, match="edited"):
            load(path, model)


@pytest.mark.parametrize(("n", "method"), [(40, None), (320, Method.tail), (320, None)])
def test_last_digits_that_another_machine_computes_otherwise_are_kept(
    path: Path, n: int, method: Method | None
) -> None:
    here = made(n, method=method)
    assert here.tail is not None
    there = named(
        replace(
            here,
            threshold=here.threshold * (1 + 1e-12),
            fail_threshold=here.fail_threshold * (1 + 1e-12),
            tail=replace(here.tail, scale=here.tail.scale * (1 + 1e-12)),
        )
    )
    assert there.id != here.id
    save(there, path)
    assert load(path, "model-a") == there
    edit(path, id=here.id)
    with pytest.raises(CalibrationError, match="edited: id not as calibrated"):
        load(path, "model-a")


def test_a_threshold_that_is_further_off_is_refused_even_with_a_fitting_id(path: Path) -> None:
    here = made(40)
    save(named(replace(here, threshold=here.threshold * (1 + 1e-8))), path)
    with pytest.raises(CalibrationError, match="edited: threshold not as calibrated"):
        load(path, "model-a")


def test_one_score_changed_is_noticed(path: Path) -> None:
    save(made(), path)
    document = json.loads(path.read_text())
    document["scores"][0] = math.nextafter(document["scores"][0], 0)
    path.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="edited: id not as calibrated"):
        load(path, "model-a")


def test_scores_out_of_order_are_noticed(path: Path) -> None:
    save(made(), path)
    document = json.loads(path.read_text())
    document["scores"].reverse()
    path.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="edited: scores not as calibrated"):
        load(path, "model-a")


def test_a_missing_key_is_named(path: Path) -> None:
    save(made(), path)
    document = json.loads(path.read_text())
    for key in document.keys() - {"schema"}:
        path.write_text(json.dumps({name: value for name, value in document.items() if name != key}))
        with pytest.raises(CalibrationError, match=f"edited.*{key}"):
            load(path, "model-a")


def test_a_calibration_of_another_model_is_refused_with_both_names(path: Path) -> None:
    save(made(model="model-b"), path)
    with pytest.raises(
        CalibrationError, match="made for another model: model-b, not model-a; run `inspectd calibrate`"
    ):
        load(path, "model-a")


def test_a_calibration_within_other_regions_is_refused_with_both_names(path: Path) -> None:
    save(made(regions="mask-1"), path)
    assert load(path, "model-a", "mask-1") == read(path)
    with pytest.raises(CalibrationError, match=r"other masks or region rules \(mask-1, not mask-2\)"):
        load(path, "model-a", "mask-2")
    with pytest.raises(CalibrationError, match=r"\(mask-1, not none\); run `inspectd calibrate"):
        load(path, "model-a")
    save(made(), path)
    with pytest.raises(CalibrationError, match=r"\(none, not mask-1\)"):
        load(path, "model-a", "mask-1")


def test_a_calibration_of_images_framed_otherwise_is_refused_with_both_framings_and_the_cure(path: Path) -> None:
    save(made(framing="frame-1"), path)
    assert load(path, "model-a", framing="frame-1") == load(path, "model-a", framing=None) == read(path)
    with pytest.raises(CalibrationError, match=r"\(frame-1, now frame-2\); run `inspectd calibrate --config FILE"):
        load(path, "model-a", framing="frame-2")
    with pytest.raises(CalibrationError, match=r"\(frame-1, now not at all\)"):
        load(path, "model-a")
    save(made(), path)
    with pytest.raises(CalibrationError, match=r"\(not at all, now frame-1\)"):
        load(path, "model-a", framing="frame-1")


def test_a_calibration_from_before_there_were_framings_is_one_of_plain_images(path: Path) -> None:
    save(made(), path)
    assert "framing" not in json.loads(path.read_text())["provenance"]
    assert load(path, "model-a", framing="").provenance.framing == ""
    assert made().id != made(framing="frame-1").id


def test_a_proposal_changes_nothing_until_it_is_accepted(path: Path) -> None:
    save(made(), path)
    assert propose(made(200), path) == proposal(path) == path.parent / "calibration.proposed.json"
    assert (load(path, "model-a"), read(proposal(path))) == (made(), made(200))
    assert history(path) == []
    assert accept(path, made(200).id) == load(path, "model-a") == made(200)
    assert not proposal(path).exists()
    assert history(path) == [made(), made(200)]


def test_the_first_calibration_can_be_a_proposal(path: Path) -> None:
    propose(made(), path)
    assert accept(path, made().id) == load(path, "model-a") == made()
    assert history(path) == [made()]


def test_the_history_has_each_calibration_once_in_the_order_in_which_they_came_into_force(path: Path) -> None:
    for n in range(100, 112):
        install(made(n), path)
    install(made(105), path)
    assert [one.good_parts for one in history(path)] == list(range(100, 112))
    assert load(path, "model-a") == made(105)


def test_without_a_proposal_there_is_nothing_to_accept(path: Path) -> None:
    save(made(), path)
    with pytest.raises(CalibrationError, match=r"calibration\.proposed\.json: there is no proposal; run"):
        accept(path, made().id)
    assert load(path, "model-a") == made()


def test_only_the_proposal_that_was_read_is_accepted(path: Path) -> None:
    save(made(), path)
    propose(made(200), path)
    with pytest.raises(CalibrationError, match=f"the proposal is {made(200).id}, not {made(150).id}; read its card"):
        accept(path, made(150).id)
    assert load(path, "model-a") == made()


def test_a_proposal_that_was_edited_is_not_accepted(path: Path) -> None:
    save(made(), path)
    edit(propose(made(200), path), threshold=1000.0)
    with pytest.raises(CalibrationError, match="edited"):
        accept(path, made(200).id)
    assert load(path, "model-a") == made()
    assert history(path) == []
    assert proposal(path).exists()


@pytest.mark.parametrize("present", ["", "{", '{"schema": "inspectd.calibration/1"}'])
def test_a_calibration_that_cannot_be_trusted_does_not_keep_another_from_its_place(path: Path, present: str) -> None:
    path.write_text(present)
    propose(made(), path)
    assert accept(path, made().id) == load(path, "model-a") == made()
    assert history(path) == [made()]


def test_where_the_history_cannot_be_kept_the_present_one_stays_in_force(path: Path) -> None:
    save(made(), path)
    path.with_suffix(".history").write_text("in the way")
    propose(made(200), path)
    with pytest.raises(OSError, match="history"):
        accept(path, made(200).id)
    assert load(path, "model-a") == made()
    assert read(proposal(path)) == made(200)


def test_a_kill_before_the_proposal_is_gone_does_no_harm(path: Path) -> None:
    save(made(), path)
    propose(made(200), path)
    whole = proposal(path).read_bytes()
    accept(path, made(200).id)
    proposal(path).write_bytes(whole)  # as if killed between the last two steps
    assert accept(path, made(200).id) == load(path, "model-a") == made(200)
    assert history(path) == [made(), made(200)]


def test_a_kill_before_the_present_one_is_replaced_does_not_change_what_is_earlier(path: Path) -> None:
    install(made(100), path)
    install(made(110), path)
    whole = path.read_bytes()
    install(made(120), path)
    path.write_bytes(whole)  # as if killed between the last two steps
    assert earlier(path) == made(100)


def test_a_reader_always_meets_a_calibration_in_force_while_another_is_installed(path: Path) -> None:
    one, other = made(99), made(200)
    save(one, path)
    stop = threading.Event()

    def keep_installing() -> None:
        while not stop.is_set():
            install(other, path)
            install(one, path)

    writer = threading.Thread(target=keep_installing)
    writer.start()
    try:
        met = {load(path, "model-a").id for _ in range(20)}
    finally:
        stop.set()
        writer.join()
    assert met <= {one.id, other.id}


def test_going_back_twice_goes_back_twice(path: Path) -> None:
    first, second, third = (made(n) for n in (100, 110, 120))
    for one in (first, second, third):
        install(one, path)
    install(earlier(path), path)
    assert load(path, "model-a") == second
    install(earlier(path), path)
    assert load(path, "model-a") == first
    assert earlier(path, third.id) == third
    with pytest.raises(CalibrationError, match="no earlier calibration; known: "):
        earlier(path)


def test_an_unknown_one_lists_those_that_are_known(path: Path) -> None:
    with pytest.raises(CalibrationError, match="no earlier calibration; known: none"):
        earlier(path)
    first, second = made(100), made(110)
    for one in (first, second):
        install(one, path)
    with pytest.raises(CalibrationError, match=f"no earlier calibration 123456789abc; known: {first.id}, {second.id}"):
        earlier(path, "123456789abc")


def test_one_bad_file_in_the_history_does_not_spoil_the_others(path: Path) -> None:
    for n in (100, 110, 120):
        install(made(n), path)
    archive = path.with_suffix(".history")
    edit(next(archive.glob("000002-*")), threshold=1000.0)
    (archive / "000007-0123456789ab.json").write_text("torn")
    (archive / "copy-of-old.json").write_text("{}")
    assert history(path) == [made(100), made(120)]
    assert earlier(path) == made(100)
    install(made(130), path)
    assert earlier(path) == made(120)


def test_a_file_is_written_whole_in_any_script(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for text in ("α ≤ 1 %\n", ""):
        write_whole(path, text.encode())
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "page.html" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"page\.html"):
        write_whole(tmp_path / "page.html", b"?", lasting=False)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
