"""Whatever comes on a command's topic is understood or refused by its code, and nothing ends the thread that reads."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemon.messages import Trigger
from daemon.requests import (
    CORRELATION_LIMIT,
    ID_LIMIT,
    REQUEST,
    REQUEST_LIMIT,
    RESPONSE,
    TRIGGER,
    Action,
    Code,
    Received,
    RefusedError,
    encode_response,
    pack,
    parse,
    response,
    unpack,
)
from tests.payloads import AT, IDENTITY

B = IDENTITY.base


def received(content: object, leaf: str = REQUEST, **more: Any) -> Received:
    payload = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
    return Received(f"{B}/{leaf}", payload, **more)


def refusal(content: object, leaf: str = REQUEST, **more: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse(received(content, leaf, **more))
    answer = encode_response(
        IDENTITY, (caught.value.cmd_id, caught.value.action), caught.value.code, str(caught.value), "Ready", AT
    )
    assert len(answer) <= 1024
    assert json.loads(answer)["code"] == caught.value.code
    return caught.value


def command(action: str, **args: Any) -> dict[str, Any]:
    return {"cmd_id": "17", "action": action, "args": args}


# What is understood


@pytest.mark.parametrize(
    "content",
    [
        *({"cmd_id": "17", "action": action} for action in Action if action not in {"prepare_recipe", "ack_result"}),
        command("trigger", trigger_id="T1", part_id="SN-1", batch_id="B", meta={"a": 1, "b": "x", "c": 0.5, "d": True}),
        command("prepare_recipe", recipe="flange"),
        command("prepare_recipe", index=2),
        command("ack_result", seq=9007199254740991),
        command("ack_result", id="01JDA5ZK3V9Q4W8R7T6Y5M2N1P"),
        {"schema": "inspectd.command/1", **command("stop"), "user": "Jörg", "expires_ms": 1},
    ],
)
def test_every_command_of_the_contract_is_understood(content: dict[str, Any]) -> None:
    request = parse(received(content))
    assert (request.cmd_id, request.action.value, request.user) == ("17", content["action"], content.get("user", ""))
    assert request.args == content.get("args", {})
    assert request.expires_ms == content.get("expires_ms")


def test_the_fast_path_needs_no_action_and_says_of_the_part_what_the_other_says() -> None:
    fast = parse(received({"cmd_id": "17", "trigger_id": "T1", "part_id": "SN-1", "meta": {"a": 1}}, TRIGGER))
    slow = parse(received(command("trigger", trigger_id="T1", part_id="SN-1", meta={"a": 1})))
    assert fast.action is slow.action is Action.TRIGGER
    assert {key: fast.args[key] for key in slow.args} == slow.args


# What is refused


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", Code.BAD_ARGS),
        (b"\xff\xfe\x00{}", Code.BAD_ARGS),
        (b"{", Code.BAD_ARGS),
        (b"17", Code.BAD_ARGS),
        (b"[]", Code.BAD_ARGS),
        (b"null", Code.BAD_ARGS),
        (b'{"cmd_id":"17","action":"trigger","args":{"meta":{"a":1e999}}}', Code.BAD_ARGS),
        (b'{"cmd_id":"17","action":"trigger","args":{"meta":{"a":NaN}}}', Code.BAD_ARGS),
        (b'{"cmd_id":"17","action":"trigger","args":{"meta":{"a":%s}}}' % (b"9" * 900), Code.BAD_ARGS),
        (b'{"cmd_id":"17","action":"trigger","args":{"part_id":"\\ud800"}}', Code.BAD_ARGS),
        (b'{"cmd_id":"\\udc00","action":"stop"}', Code.BAD_ARGS),
        ({"action": "stop"}, Code.BAD_ARGS),
        ({"cmd_id": "", "action": "stop"}, Code.BAD_ARGS),
        ({"cmd_id": 17, "action": "stop"}, Code.BAD_ARGS),
        ({"cmd_id": "1" * 65, "action": "stop"}, Code.BAD_ARGS),
        ({"cmd_id": "a\x00b", "action": "stop"}, Code.BAD_ARGS),
        ({"cmd_id": "17"}, Code.UNKNOWN_ACTION),
        ({"cmd_id": "17", "action": None}, Code.UNKNOWN_ACTION),
        ({"cmd_id": "17", "action": ["stop"]}, Code.UNKNOWN_ACTION),
        ({"cmd_id": "17", "action": "STOP"}, Code.UNKNOWN_ACTION),
        ({"cmd_id": "17", "action": "set_threshold"}, Code.UNKNOWN_ACTION),
        ({"cmd_id": "17", "action": "stop", "arg": {}}, Code.BAD_ARGS),
        ({"cmd_id": "17", "action": "stop", "args": []}, Code.BAD_ARGS),
        ({"cmd_id": "17", "action": "stop", "args": {"now": True}}, Code.BAD_ARGS),
        ({"cmd_id": "17", "action": "stop", "schema": "inspectd.command/2"}, Code.BAD_ARGS),
        ({"cmd_id": "17", "action": "stop", "expires_ms": 0}, Code.BAD_ARGS),
        ({"cmd_id": "17", "action": "stop", "expires_ms": "soon"}, Code.BAD_ARGS),
        ({"cmd_id": "17", "action": "ack_result"}, Code.BAD_ARGS),
        (command("ack_result"), Code.BAD_ARGS),
        (command("ack_result", seq=1, id="x"), Code.BAD_ARGS),
        (command("ack_result", seq=True), Code.BAD_ARGS),
        (command("ack_result", seq=0), Code.BAD_ARGS),
        (command("prepare_recipe"), Code.BAD_ARGS),
        (command("prepare_recipe", recipe="a", index=1), Code.BAD_ARGS),
        (command("trigger", partid="SN-1"), Code.BAD_ARGS),
        (command("trigger", part_id=4711), Code.BAD_ARGS),
        (command("trigger", meta={"a": None}), Code.BAD_ARGS),
        (command("trigger", meta={"a": {"b": 1}}), Code.BAD_ARGS),
        (command("trigger", meta={"a": "x" * 300}), Code.BAD_ARGS),
        (command("trigger", meta={str(n): n for n in range(17)}), Code.BAD_ARGS),
    ],
)
def test_what_is_no_command_is_refused_with_its_code(content: object, code: Code) -> None:
    refused = refusal(content)
    assert refused.code is code
    assert str(refused)


def test_a_refusal_says_which_command_it_is_about_as_far_as_that_can_be_read() -> None:
    refused = refusal(command("trigger", partid="SN-1"))
    assert (refused.cmd_id, refused.action) == ("17", "trigger")
    assert "partid" in str(refused)
    assert refusal({"cmd_id": "18", "action": "fly"}).cmd_id == "18"
    assert refusal(b"\x00").cmd_id == ""


def test_another_action_than_a_trigger_is_refused_on_the_fast_path() -> None:
    assert refusal({"cmd_id": "17", "action": "halt"}, TRIGGER).code is Code.BAD_ARGS
    assert refusal({"cmd_id": "17", "args": {}}, TRIGGER).code is Code.BAD_ARGS


@pytest.mark.parametrize("leaf", [REQUEST, TRIGGER])
def test_a_retained_command_is_refused_for_that_whatever_it_asks(leaf: str) -> None:
    refused = refusal({"cmd_id": "17", "action": "trigger"}, leaf, retained=True)
    assert (refused.code, refused.cmd_id) == (Code.RETAINED_REFUSED, "17")
    assert refusal({"cmd_id": "17", "action": "fly"}, leaf, retained=True).code is Code.RETAINED_REFUSED


def test_a_command_has_at_most_a_kilobyte() -> None:
    whole = json.dumps({"cmd_id": "17", "action": "get_state"}).encode()
    assert parse(received(whole.ljust(REQUEST_LIMIT))).action is Action.GET_STATE
    assert refusal(whole.ljust(REQUEST_LIMIT + 1)).code is Code.BAD_ARGS


@pytest.mark.parametrize("key", ["cmd_id", "trigger_id", "part_id", "batch_id"])
@pytest.mark.parametrize("letter", ["ü", "\U0001f529", '"', "\\"])
def test_an_id_that_would_come_back_cut_is_refused(key: str, letter: str) -> None:
    fits = letter * (ID_LIMIT // (len(json.dumps(letter, ensure_ascii=False).encode()) - 2))
    whole = parse(received({"cmd_id": "17", key: fits}, TRIGGER))
    assert {"cmd_id": whole.cmd_id, **whole.args}[key] == fits
    answer = encode_response(IDENTITY, (whole.cmd_id, whole.action), Code.DONE, "", "Ready", AT)
    assert json.loads(answer)["cmd_id"] == whole.cmd_id
    refused = refusal({"cmd_id": "17", key: fits + letter}, TRIGGER)
    assert refused.code is Code.BAD_ARGS
    assert key in str(refused)


NESTED = [(b'{"a":', b"1", b"}"), (b"[", b"", b"]")]


@pytest.mark.parametrize(("opens", "inmost", "closes"), NESTED)
@pytest.mark.parametrize(
    "place",
    [
        b"%s",
        b'{"cmd_id":%s,"action":"stop"}',
        b'{"cmd_id":"17","action":%s}',
        b'{"cmd_id":"17","action":"trigger","args":%s}',
        b'{"cmd_id":"17","action":"trigger","args":{"meta":%s}}',
    ],
)
def test_however_deep_a_command_is_nested_it_is_refused(
    place: bytes, opens: bytes, inmost: bytes, closes: bytes
) -> None:
    most = (REQUEST_LIMIT - len(place)) // (len(opens) + len(closes))
    for depth in range(2, most):
        content = place % (opens * depth + inmost + closes * depth)
        assert refusal(content).code in {Code.BAD_ARGS, Code.UNKNOWN_ACTION}
    # What is never closed reaches deeper still.
    for depth in range(2, REQUEST_LIMIT // len(opens)):
        assert refusal(opens * depth).code is Code.BAD_ARGS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["cmd_id", "action", "args", "user", "expires_ms", "schema", "part_id", "meta", "seq", "index"])
ODD = st.dictionaries(KEYS | st.text(), JSON | st.sampled_from(list(Action))).map(lambda it: json.dumps(it).encode())


@given(st.binary(max_size=1200) | ODD, st.sampled_from([REQUEST, TRIGGER]))
@example(b'{"cmd_id":"1","action":"ack_result","args":{"seq":1e300}}', REQUEST)
@example(b'{"cmd_id":"1","action":"prepare_recipe","args":{"index":2.0}}', REQUEST)
@example(b'{"cmd_id":"1","action":"trigger","args":{"meta":{"":""}}}', REQUEST)
def test_anything_at_all_is_either_a_request_or_a_refusal_that_can_be_answered(payload: bytes, leaf: str) -> None:
    try:
        request = parse(Received(f"{B}/{leaf}", payload))
    except RefusedError as refused:
        named, code, why = (refused.cmd_id, refused.action), refused.code, str(refused)
    else:
        named, code, why = (request.cmd_id, request.action.value), Code.DONE, ""
    answer = json.loads(encode_response(IDENTITY, named, code, why, "Ready", AT))
    assert answer["code"] == code


# Where answers go


def test_an_answer_goes_to_the_stations_own_topic_or_to_where_the_request_says() -> None:
    usual = response(IDENTITY, Received(f"{B}/{REQUEST}", b""), b"{}")
    assert (usual.topic, usual.qos, usual.retain, usual.expires_s) == (f"{B}/{RESPONSE}", 1, False, 60)
    there = response(IDENTITY, Received(f"{B}/{REQUEST}", b"", reply_to="plc7/answers", correlation=b"\x00\xff"), b"{}")
    assert (there.topic, there.correlation, there.payload) == ("plc7/answers", b"\x00\xff", b"{}")
    below = response(IDENTITY, Received(f"{B}/{REQUEST}", b"", reply_to=f"{B}/{RESPONSE}/plc7"), b"{}")
    assert (below.topic, below.qos) == (f"{B}/{RESPONSE}/plc7", 1)


def test_an_answer_elsewhere_asks_for_no_acknowledgement_which_a_broker_could_refuse() -> None:
    assert response(IDENTITY, Received(f"{B}/{REQUEST}", b"", reply_to="plc7/answers"), b"{}").qos == 0


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "#",
        "plc7/+",
        "plc7/\0",
        "$SYS/broker",
        "$share/g/plc7",
        "x" * 257,
        f"{B}/verdict",
        f"{B}/plc",
        f"{B}/{REQUEST}",
        f"{B}/{TRIGGER}",
        f"{B}/{RESPONSE}s",
        f"{IDENTITY.prefix}/side/{RESPONSE}",
        f"{IDENTITY.prefix}/side/cmd/request",
    ],
)
def test_an_answer_goes_nowhere_that_a_station_speaks_or_listens_or_that_is_no_topic(topic: str) -> None:
    with pytest.raises(RefusedError) as refused:
        response(IDENTITY, Received(f"{B}/{REQUEST}", b"", reply_to=topic), b"{}")
    assert refused.value.code is Code.BAD_ARGS


def test_correlation_data_are_bounded() -> None:
    asked = Received(f"{B}/{REQUEST}", b"", reply_to="plc7", correlation=bytes(CORRELATION_LIMIT))
    assert response(IDENTITY, asked, b"").correlation == bytes(CORRELATION_LIMIT)
    with pytest.raises(RefusedError):
        response(IDENTITY, replace(asked, correlation=bytes(CORRELATION_LIMIT + 1)), b"")


# What outlives a restart


@given(
    st.text(max_size=64),
    st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False),
    ),
)
def test_a_trigger_is_the_same_after_a_restart(part_id: str, meta: dict[str, Any]) -> None:
    part_id = part_id.encode(errors="replace").decode()
    trigger = Trigger("01JDA5ZK3V9Q4W8R7T6Y5M2N1V", 7, datetime.now(UTC), "T-1", part_id, "B", meta)
    assert unpack(pack(trigger)) == trigger
