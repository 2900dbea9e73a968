"""What rounds come to, and how it is shown."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from daemon.desk.bench import sheet
from daemon.desk.bench.contest import Heat, Record, figures, of_rounds, ratio
from daemon.desk.bench.event import BESIDE, FILE, MEMORY, Plan, Report, choose_engines, draw_image
from daemon.desk.bench.machine import Machine, look
from daemon.desk.bench.path import Percentiles, WholePath
from daemon.desk.bench.rival import Start, Turn
from daemon.images import read
from detectors.artifact import Manifest
from detectors.base import ArtifactError

MACHINE = Machine("a CPU", 2, 2, ("avx2",), None, (), 8.0, "6.1", "3.11.7", 0.1, 0.01)
TAKEN = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=8)


def turn(*ms: float, batch: int = 1, cpu_s: float = 0.0) -> Turn:
    return Turn(ms, batch, cpu_s, 100.0)


def report(*records: Record, beside: dict[str, Record] | None = None, path: WholePath | None = None) -> Report:
    plan = Plan(Path("m"), {"torch": "torch", "openvino-int8": "openvino-int8/0"}, (Path("a.png"),), "An image")
    manifest = Manifest("rd4ad", {"backbone": "resnet18", "size": 256}, {}, {}, {})
    faults = tuple(f"{record.name}: {record.fault}" for record in records if record.fault)
    return Report(plan, manifest, MACHINE, {record.name: record for record in records}, beside or {}, path, faults)


def record(name: str, ms: float, fault: str | None = None) -> Record:
    turns = {heat: {0: turn(ms, ms), 1: turn(2 * ms)} for heat in (MEMORY, FILE)}
    return Record(name, Start(1.5, 0.5, 200.0, f"{name} 1.0", {"torch": "2"}), fault, turns)


def shown(report: Report) -> str:
    page = io.StringIO()
    console = Console(file=page, width=80)
    for table in sheet.tables(report):
        console.print(table)
    return page.getvalue()


def test_frames_and_cpu_time_count_by_image_and_milliseconds_by_call() -> None:
    found = figures([turn(10.0, 30.0, batch=4, cpu_s=0.08), turn(20.0, batch=4, cpu_s=0.04)])
    assert (found.calls, found.p50_ms) == (3, 20.0)
    assert found.per_second == pytest.approx(12 / 0.06)
    assert found.cpu_ms == pytest.approx(10.0)


def test_a_ratio_holds_within_a_round_however_the_rounds_differ() -> None:
    slow_machine_in_round_1 = {0: turn(100.0), 1: turn(900.0), 2: turn(100.0)}
    other = {0: turn(50.0), 1: turn(450.0), 2: turn(50.0)}
    found = ratio(slow_machine_in_round_1, other)
    assert found is not None
    assert (found.median, found.low, found.high, found.rounds) == (2.0, 2.0, 2.0, 3)


def test_a_batch_is_compared_by_its_images() -> None:
    found = ratio({0: turn(10.0)}, {0: turn(40.0, batch=4)})
    assert found is not None
    assert found.median == 1.0


def test_rounds_in_which_one_did_not_run_do_not_count() -> None:
    found = ratio({0: turn(1.0), 1: turn(2.0)}, {1: turn(1.0), 2: turn(1.0)})
    assert found is not None
    assert (found.median, found.rounds) == (2.0, 1)
    assert ratio({0: turn(1.0)}, {1: turn(1.0)}) is None
    assert of_rounds([]) is None


@given(st.lists(st.tuples(TAKEN, TAKEN), min_size=1, max_size=9))
def test_a_ratio_and_its_inverse_multiply_to_one_where_rounds_are_odd(
    rounds: list[tuple[list[float], list[float]]],
) -> None:
    odd = rounds if len(rounds) % 2 else rounds[1:] or rounds
    ours = {number: turn(*mine) for number, (mine, _) in enumerate(odd)}
    theirs = {number: turn(*other) for number, (_, other) in enumerate(odd)}
    there, back = ratio(ours, theirs), ratio(theirs, ours)
    assert there is not None
    assert back is not None
    assert len(odd) % 2 == 0 or there.median * back.median == pytest.approx(1.0)
    assert there.low <= there.median * (1 + 1e-9)
    assert there.median <= there.high * (1 + 1e-9)


def test_the_table_fits_a_small_window_with_the_reference_first() -> None:
    page = shown(report(record("torch", 120.0), record("openvino-int8", 12.0)))
    assert "…" not in page.replace("1.00…1.00", "").replace("10.00…10.00", "")
    assert page.index("torch") < page.index("openvino-int8")
    assert "10.00 (10.00…10.00)" in page


def test_a_contender_that_fell_has_a_row_and_a_reason() -> None:
    fallen = Record("openvino-int8", fault="killed by SIGKILL: it printed nothing")
    seen = report(record("torch", 120.0), fallen)
    assert "failed" in shown(seen)
    assert any("killed by SIGKILL" in note for note in sheet.notes(seen))
    (entry,) = (each for each in sheet.document(seen)["contenders"] if each["fault"])
    assert entry["name"] == "openvino-int8"
    assert entry["start"] is None


def test_the_document_holds_every_call_and_is_json() -> None:
    beside = {name: Record(name, turns={BESIDE: {0: turn(200.0)}}) for name in ("torch", "openvino-int8")}
    times = Percentiles(1.0, 2.0, 3.0)
    path = WholePath("Mosquitto", "torch", 9, times, times, 1.0, 2.0, 2.0, 30.0, of_rounds([0.97]))
    seen = report(record("torch", 120.0), record("openvino-int8", 12.0), beside=beside, path=path)
    document = json.loads(json.dumps(sheet.document(seen), allow_nan=False))
    first, second = document["contenders"]
    assert first["heats"][0]["turns_ms"] == {"0": [120.0, 120.0], "1": [240.0]}
    assert second["heats"][0]["times_as_fast"]["median"] == 10.0
    assert second["beside"]["p50_ms"] == 200.0
    assert document["whole_path"]["share"]["median"] == 0.97
    assert "97%" in shown(seen)


def test_a_busy_machine_is_warned_of() -> None:
    busy = Machine("a CPU", 2, 1, (), "powersave", ("a GPU, driver 1, 2 MiB",), 8.0, "6.1", "3.11.7", 2.0, 0.6)
    assert MACHINE.warning is None
    assert busy.warning is not None
    said = "\n".join(sheet.lines(busy))
    for word in ("not idle", "60%", "1 usable", "powersave", "a GPU"):
        assert word in said


def test_this_machine_is_described() -> None:
    machine = look()
    assert machine.cpu
    assert machine.cores >= machine.usable_cores >= 1
    assert machine.ram_gb > 0.1
    assert 0 <= machine.busy <= 1


def test_the_image_that_is_drawn_can_be_read(tmp_path: Path) -> None:
    draw_image(tmp_path / "drawn.jpg")
    assert read(tmp_path / "drawn.jpg").shape == (960, 1280, 3)


def test_without_a_name_all_engines_that_there_are_compete_and_the_reference_leads(tmp_path: Path) -> None:
    place = tmp_path / "engines/openvino-int8/0123abcd"
    place.mkdir(parents=True)
    (place / "engine.json").write_text("{}")
    assert choose_engines(tmp_path, []) == {"torch": "torch", "openvino-int8": "openvino-int8/0123abcd"}
    assert choose_engines(tmp_path, ["openvino-int8"]) == {"openvino-int8": "openvino-int8/0123abcd"}
    with pytest.raises(ArtifactError, match="no engine is called abacus"):
        choose_engines(tmp_path, ["abacus"])


def test_larger_batches_have_fewer_calls_but_one() -> None:
    assert [Heat("memory", batch).calls for batch in (1, 2, 8)] == [5, 2, 1]
