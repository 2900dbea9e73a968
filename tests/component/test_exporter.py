"""The page of figures over HTTP, by stations that do not run; Prometheus and its checker where they are installed."""

import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs
from ulid import ULID

from config.load import load
from config.schema import Metrics as MetricsSection
from config.schema import Settings
from daemon.messages import Outcome
from daemon.metrics import Line, Metrics, serving
from daemon.outbox import Entry, Outbox
from daemon.pipeline import Group, Station
from daemon.stats import Drop, Stats
from tests.brokers import DEADLINE_S, HOST, ROOT, eventually, free_port
from tests.component.test_pipeline import calibrated, group_of, station
from tests.unit.test_metrics_page import AT, CONFIGURATION, verdict

PAGE = (ROOT / "docs/metrics.md").read_text()
EXAMPLES = ROOT / "docs/examples"
DASHBOARD = json.loads((EXAMPLES / "grafana.json").read_text())
ELSEWHERE = "192.0.2.1"
"""An address that no machine has: it is kept for documents."""
NAME = re.compile(r"\b(?:inspectd|process)_[a-z_]+\b")
promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)


@dataclass
class Session:
    """A session with the broker, as the page asks it."""

    connected: bool = True
    actuations_dropped: int = 0


@dataclass
class Rig:
    """Two stations and their group, with what they have counted, on a page."""

    url: str
    metrics: Metrics
    outbox: Outbox
    stations: Mapping[str, Station]
    groups: Mapping[str, Group]
    sinks: dict[str, Session] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)
    pictures_dropped: int = 0

    def read(self) -> dict[str, Metric]:
        """The families of the page by their names."""
        return {family.name: family for family in text_string_to_metric_families(self.text())}

    def text(self) -> str:
        with urlopen(self.url, timeout=DEADLINE_S) as answer:  # noqa: S310 -- our own page
            return str(answer.read().decode())

    def value(self, name: str, **labels: str) -> float:
        """The only sample of a name with these labels and maybe more."""
        samples = [sample for family in self.read().values() for sample in family.samples if sample.name == name]
        (value,) = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
        return float(value)


def configured(folder: Path, section: str) -> Settings:
    file = folder / "inspectd.toml"
    file.write_text(CONFIGURATION.replace("[metrics]", section))
    return load(file, {})


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    port = free_port()
    (tmp_path / "state").mkdir()
    stations = {"cam1": station("cam1", calibrated([1.0, 2.0, 3.0], alpha=0.01)), "cam2": station("cam2")}
    groups = {"part": group_of(*stations.values())}
    with (
        closing(Outbox(tmp_path / "outbox.sqlite3")) as outbox,
        serving(configured(tmp_path, f"[metrics]\nport = {port}\n")) as metrics,
    ):
        assert metrics is not None
        rig = Rig(f"http://{HOST}:{port}/metrics", metrics, outbox, stations, groups)
        for name in ("cam1", "cam2", "part"):
            rig.sinks[name] = Session()
            rig.stats[name] = Stats(AT, dict.fromkeys(Outcome, 0), dict.fromkeys(Drop, 0))
        metrics.show(
            Line(stations, groups, rig.sinks, outbox, lambda name: rig.stats[name], lambda: rig.pictures_dropped)
        )
        yield rig


def keep(outbox: Outbox, name: str, seq: int, came: datetime) -> None:
    outbox.keep([Entry(name, seq, str(ULID.from_datetime(came)), b"{}", Outcome.PASS)])


def test_the_page_says_what_stations_and_groups_have_counted(rig: Rig) -> None:
    counted = dict.fromkeys(Drop, 0) | {Drop.QUEUE: 4}
    rig.stats["cam1"] = Stats(
        AT, dict.fromkeys(Outcome, 0) | {Outcome.PASS: 7, Outcome.FAIL: 2}, counted, pending=3, too_late=1
    )
    rig.sinks["cam1"].actuations_dropped = 5
    rig.pictures_dropped = 6
    assert rig.value("inspectd_frames_total", station="cam1", outcome="inspected") == 9
    assert rig.value("inspectd_frames_total", station="cam1", outcome="queue") == 4
    assert rig.value("inspectd_frames_total", station="part", outcome="inspected") == 0
    assert rig.value("inspectd_parts_pending", station="cam1") == 3
    assert rig.value("inspectd_gate_too_late_total", station="cam1") == 1
    assert rig.value("inspectd_gate_dropped_total", station="cam1") == 5
    assert rig.value("inspectd_gate_dropped_total", station="part") == 0
    assert rig.value("inspectd_pictures_dropped_total") == 6


def test_the_page_says_what_is_away_and_in_what_state_that_leaves_a_station(rig: Rig) -> None:
    for name in ("cam1", "cam2"):
        rig.stations[name].health.source_is(available=True)
    assert [rig.value("inspectd_source_up", station=name) for name in ("cam1", "part")] == [1, 1]
    assert rig.value("inspectd_state", station="cam1", state="ContinuousExecution") == 1
    rig.stations["cam1"].health.source_is(available=False)
    rig.sinks["part"].connected = False
    assert [rig.value("inspectd_source_up", station=name) for name in ("cam1", "cam2", "part")] == [0, 1, 0]
    assert [rig.value("inspectd_mqtt_connected", station=name) for name in ("cam1", "cam2", "part")] == [1, 1, 0]
    states = [s for s in rig.read()["inspectd_state"].samples if s.labels["station"] == "cam1"]
    assert {sample.labels["state"]: sample.value for sample in states if sample.value} == {"Error": 1}


def test_of_several_words_the_one_of_the_state_holds(rig: Rig) -> None:
    page = rig.read()
    states = {name: one.health.state(0) for name, one in rig.stations.items()}
    states |= {name: group.health.state(0) for name, group in rig.groups.items()}
    assert states["cam1"].drift == "ok"
    for name, state in states.items():
        for word, holds in {"state": state.state, "drift": state.drift, "challenge": state.challenge}.items():
            samples = [s for s in page[f"inspectd_{word}"].samples if s.labels["station"] == name]
            (found,) = [sample.labels for sample in samples if sample.value == 1]
            assert holds in found.values()


def test_an_active_alarm_is_1_with_its_priority_and_the_others_0(rig: Rig) -> None:
    rig.stations["cam1"].health.update(0)
    active = rig.read()["inspectd_alarm_active"].samples
    assert all(sample.value == 0 for sample in active if sample.labels["station"] != "cam1")
    raised = {sample.labels["alarm"]: sample.labels["priority"] for sample in active if sample.value}
    assert raised == {"NOT_CALIBRATED": "3"}  # which has no delay


def test_the_outbox_is_as_deep_and_as_old_as_what_waits_in_it(rig: Rig) -> None:
    assert [rig.value(f"inspectd_outbox_{what}", station="cam1") for what in ("depth", "oldest_age_seconds")] == [0, 0]
    now = datetime.now(UTC)
    keep(rig.outbox, "cam1", 1, now - timedelta(hours=2))
    keep(rig.outbox, "cam1", 2, now)
    assert rig.value("inspectd_outbox_depth", station="cam1") == 2
    assert 7200 <= rig.value("inspectd_outbox_oldest_age_seconds", station="cam1") < 7200 + DEADLINE_S
    assert rig.value("inspectd_outbox_oldest_age_seconds", station="part") == 0
    rig.outbox.quarantine(rig.outbox.entries("cam1", 0, 1)[0])
    assert rig.value("inspectd_outbox_quarantined", station="cam1") == 1
    assert rig.value("inspectd_outbox_oldest_age_seconds", station="cam1") < DEADLINE_S


def test_a_record_that_cannot_be_read_costs_its_age_and_nothing_else(rig: Rig) -> None:
    keep(rig.outbox, "cam1", 1, datetime.now(UTC))
    rig.outbox.close()
    page = rig.read()
    assert [s.labels["station"] for s in page["inspectd_outbox_oldest_age_seconds"].samples] == ["cam2", "part"]
    assert [s.value for s in page["inspectd_outbox_depth"].samples] == [1, 0, 0]


def test_the_page_says_by_what_parts_are_judged(rig: Rig) -> None:
    recipe = rig.stations["cam1"].recipes.current
    assert rig.value("inspectd_model_info", station="cam1", calibration=recipe.calibration.id, recipe="default") == 1
    assert rig.value("inspectd_calibration_alpha", station="cam1") == recipe.calibration.alpha_carried
    assert 0 <= rig.value("inspectd_calibration_age_seconds", station="cam1") < DEADLINE_S


def test_without_the_section_nobody_listens_and_nothing_is_counted(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with serving(configured(tmp_path, "")) as metrics:
        assert metrics is None
        assert set(threading.enumerate()) == before


def test_at_the_end_neither_the_port_nor_a_thread_is_held(tmp_path: Path) -> None:
    port, before = free_port(), set(threading.enumerate())
    settings = configured(tmp_path, f"[metrics]\nport = {port}\n")
    for _ in range(2):  # so the port is free again
        with serving(settings), urlopen(f"http://{HOST}:{port}/metrics", timeout=DEADLINE_S) as answer:
            assert answer.status == 200
        eventually(lambda: set(threading.enumerate()) == before, "the end of all threads")
        with pytest.raises(URLError):
            urlopen(f"http://{HOST}:{port}/metrics", timeout=DEADLINE_S)


def test_the_page_listens_to_its_own_machine_alone_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    port = free_port()
    with serving(configured(tmp_path, f"[metrics]\nport = {port}\n")), socket.socket() as elsewhere:
        assert elsewhere.connect_ex(("127.0.0.2", port)) != 0
    with (
        serving(configured(tmp_path, f'[metrics]\nhost = "0.0.0.0"\nport = {port}\n')),
        socket.socket() as elsewhere,
    ):
        assert elsewhere.connect_ex(("127.0.0.2", port)) == 0


def test_a_port_that_is_taken_is_said_with_its_section_its_key_and_a_cure(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        settings = configured(tmp_path, f"[metrics]\nport = {port}\n")
        with capture_logs() as logs, serving(settings) as page:
            assert page is None
    assert re.match(rf"metrics\.port: {port} of 127.0.0.1 is taken.*; choose another", logs[0]["reason"])
    assert set(threading.enumerate()) == before


def test_an_address_of_another_machine_is_said(tmp_path: Path) -> None:
    settings = configured(tmp_path, f'[metrics]\nhost = "{ELSEWHERE}"\n')
    with capture_logs() as logs, serving(settings) as page:
        assert page is None
    assert re.match(rf"metrics\.host: {ELSEWHERE} is no address of this machine .*; correct it", logs[0]["reason"])


# The page that explains them


def explained() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric by its name, from the table."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?)\| (.*) \|$", PAGE, re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}


def with_a_gpu() -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \| gauge \| \| with a GPU", PAGE, re.MULTILINE))


def shown(rig: Rig) -> dict[str, tuple[str, set[str]]]:
    families = rig.read().values()
    return {
        family.name + "_total" * (family.type == "counter"): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in families
    }


def test_the_table_has_every_metric_with_its_type_and_its_labels_and_no_other(rig: Rig) -> None:
    assert len(with_a_gpu()) == 3
    told = {name: row for name, row in shown(rig).items() if name not in with_a_gpu()}
    assert told == {name: row for name, row in explained().items() if name not in with_a_gpu()}


def test_the_page_names_where_it_is_found_and_every_cause_for_which_a_part_has_no_verdict() -> None:
    usual = MetricsSection()
    assert re.findall(r"^curl (\S+)$", PAGE, re.MULTILINE) == [f"http://{usual.host}:{usual.port}/metrics"]
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `inspectd_frames_total`")]
    assert set(re.findall(r"`(\w+)`", row)) >= {cause.value for cause in Drop}


def test_no_label_can_have_a_part_in_it() -> None:
    words = {"station", "recipe", "outcome", "stage", "state", "status", "alarm", "priority"}
    about = {"model", "model_sha256", "calibration", "engine", "node", "version", "python", "torch"}
    assert set().union(*(labels for _, labels in explained().values())) == words | about


@promtool
def test_the_page_is_as_prometheus_wants_pages(rig: Rig) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=rig.text(), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


# The dashboard


def queries() -> list[str]:
    """Every query of the dashboard, with its variables as Grafana fills them in."""
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    asked += [note["expr"] for note in DASHBOARD["annotations"]["list"]]
    filled = {"$__rate_interval": "1m", "$__range": "8h", "$station": "cam1|cam2"}
    return [re.sub(r"\$\w+", lambda variable: filled[variable[0]], query) for query in asked]


@promtool
def test_every_query_of_the_dashboard_is_one(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yml"])
def test_dashboard_and_alerts_ask_for_what_there_is(rig: Rig, file: str) -> None:
    asked = set(NAME.findall((EXAMPLES / file).read_text()))
    assert {name.removesuffix("_bucket") for name in asked} <= {*shown(rig), *with_a_gpu()}
    assert len(asked) > 10


def test_the_dashboard_lets_choose_where_the_figures_come_from_and_of_which_stations(rig: Rig) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["station"]["definition"] == "label_values(inspectd_source_up, station)"
    assert {sample.labels["station"] for sample in rig.read()["inspectd_source_up"].samples} == set(rig.sinks)
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


# Prometheus


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_reads_the_page_by_the_configuration_of_its_explanation_and_answers(
    rig: Rig, tmp_path: Path
) -> None:
    example = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert example is not None
    mine = rig.url.removeprefix("http://").removesuffix("/metrics")
    shutil.copy(EXAMPLES / "alerts.yml", tmp_path)
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(example[1].replace("127.0.0.1:9464", mine).replace("15s", "1s"))
    subprocess.run(["promtool", "check", "config", configuration], check=True, capture_output=True)
    rig.metrics.observe(verdict(1.4, Outcome.FAIL), "default", AT)
    api = f"http://{HOST}:{free_port()}"
    command = ["prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    command.append(f"--web.listen-address={api.removeprefix('http://')}")
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as prometheus:
        try:
            answer = eventually(lambda: ask(api, 'inspectd_inspections_total{station="cam1",outcome="FAIL"}'), "1 FAIL")
            assert (answer["metric"]["job"], answer["metric"]["instance"]) == ("inspectd", mine)
            assert answer["value"][1] == "1"
            assert ask(api, 'up{job="inspectd"}')["value"][1] == "1"
        finally:
            prometheus.terminate()
            prometheus.wait(DEADLINE_S)


def ask(api: str, query: str) -> dict[str, Any]:
    """The first answer; an empty one as long as there is none."""
    try:
        with urlopen(f"{api}/api/v1/query?{urlencode({'query': query})}", timeout=DEADLINE_S) as answer:  # noqa: S310 -- our own Prometheus
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except OSError:
        return {}
    return found[0] if found else {}
