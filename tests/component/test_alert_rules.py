"""docs/examples/alerts.yml: each alert stays quiet, and fires, by the checker of Prometheus."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.brokers import ROOT

RULES = ROOT / "docs/examples/alerts.yml"
CASES = Path(__file__).with_name("alerts_test.yml")
ALERT = re.compile(r"- alert: (\w+)")

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)


def checked(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_whole_and_each_says_what_to_do() -> None:
    names = ALERT.findall(RULES.read_text())
    assert f"{len(names)} rules found" in checked("check", "rules", RULES)
    assert len(set(names)) == len(names)
    for rule in ALERT.split(RULES.read_text())[2::2]:
        assert re.search(r"labels: \{severity: (critical|warning|info)\}", rule)
        assert re.search(r"summary: \S.*\n +cure: \S", rule)


def test_each_alert_stays_quiet_and_fires_as_it_should() -> None:
    assert "SUCCESS" in checked("test", "rules", CASES)


@pytest.mark.parametrize("alert", ALERT.findall(RULES.read_text()))
def test_there_is_a_case_in_which_an_alert_is_quiet_and_one_in_which_it_fires(alert: str) -> None:
    cases = CASES.read_text().split("- eval_time:")[1:]
    expected = [case for case in cases if f"alertname: {alert}\n" in case]
    assert any("exp_alerts: []" in case for case in expected)
    assert any("exp_labels:" in case for case in expected)


def test_a_rule_that_were_loosened_would_be_noticed(tmp_path: Path) -> None:
    loosened = RULES.read_text().replace("inspectd_source_up == 0", "inspectd_source_up == 2")
    (tmp_path / "alerts.yml").write_text(loosened)
    (tmp_path / "cases.yml").write_text(CASES.read_text().replace("../../docs/examples/alerts.yml", "alerts.yml"))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "cases.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "InspectdSourceOffline" in done.stdout + done.stderr
