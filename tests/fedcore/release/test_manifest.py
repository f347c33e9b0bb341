import json
import re
from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError, VerificationError
from fedcore.manifest import (
    MAX_MANIFEST_BYTES,
    Description,
    InputSpec,
    Manifest,
    Metrics,
    ModelFile,
    Provenance,
    Runtime,
    parse_manifest,
    signed_message,
    version_numbers,
)

DIGITS = Manifest(
    version=7,
    previous_sha256="ab" * 32,
    file=ModelFile.of(b"weights"),
    description=Description(
        name="digits",
        created_at="2026-01-31T12:00:00Z",
        inputs=InputSpec((1, 8, 8), 0.0, 1.0),
        labels=tuple("0123456789"),
        metrics=Metrics(0.97, 0.96, 0.995),
        provenance=Provenance("run-1", 0, 20, inf, 0.0, "cd" * 32),
    ),
)

fractions = st.floats(0, 1)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
printable = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
specs = st.builds(
    lambda shape, bounds: InputSpec(tuple(shape), min(bounds), max(bounds)),
    st.lists(st.integers(1, 2**24), min_size=1, max_size=8),
    st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
)
manifests = st.builds(
    Manifest,
    version=st.integers(1, 2**31 - 1),
    previous_sha256=st.none() | digests,
    file=st.binary(min_size=1).map(ModelFile.of),
    description=st.builds(
        Description,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
        created_at=st.datetimes(timezones=st.timezones()).map(
            lambda time: f"{time.replace(tzinfo=None).isoformat(timespec='seconds')}+02:00"
        ),
        inputs=specs,
        labels=st.lists(printable, min_size=2, max_size=5, unique=True).map(tuple),
        metrics=st.builds(Metrics, fractions, fractions, fractions),
        provenance=st.builds(
            Provenance,
            run_id=printable,
            seed=st.integers(0, 2**64 - 1),
            rounds=st.integers(0, 2**31 - 1),
            epsilon=st.floats(0, allow_nan=False),
            delta=fractions,
            config_digest=digests,
        ),
        runtime=st.builds(Runtime, st.just("1.22.1"), st.integers(7, 1000)),
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def document():
    return json.loads(DIGITS.to_bytes())


def encode(values):
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def paths(values, prefix=()):
    """Every place in a JSON document."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield (*prefix, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*prefix, key))


def put(values, path, value):
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value


PATHS = list(paths(document()))


def assert_parsed_exactly_or_refused(data):
    try:
        manifest = parse_manifest(data)
    except VerificationError:
        return
    assert manifest.to_bytes() == data


@given(manifest=manifests)
def test_a_manifest_survives_its_encoding(manifest):
    assert parse_manifest(manifest.to_bytes()) == manifest


def test_the_encoding_is_pinned():
    assert DIGITS.to_bytes().decode() == (
        '{"description":{"created_at":"2026-01-31T12:00:00Z",'
        '"inputs":{"high":1.0,"low":0.0,"shape":[1,8,8]},'
        '"labels":["0","1","2","3","4","5","6","7","8","9"],'
        '"metrics":{"agreement":0.995,"float_accuracy":0.97,"int8_accuracy":0.96},'
        '"name":"digits",'
        f'"provenance":{{"config_digest":"{"cd" * 32}","delta":0.0,"epsilon":"inf",'
        '"rounds":20,"run_id":"run-1","seed":0},'
        '"runtime":{"min_onnxruntime":"1.22","opset":18}},'
        '"file":{"name":"model.onnx",'
        '"sha256":"9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c","size":7},'
        f'"format":1,"previous_sha256":"{"ab" * 32}","version":7}}'
    )


def test_what_is_signed_cannot_be_taken_for_a_bare_manifest():
    message = signed_message(DIGITS.to_bytes())

    assert message.endswith(DIGITS.to_bytes())
    with pytest.raises(VerificationError):
        parse_manifest(message)


@given(
    at=st.integers(0, len(DIGITS.to_bytes())),
    removed=st.integers(0, 8),
    inserted=st.binary(max_size=8)
    | st.text('{}[]",:0123456789eE.-+ainft\\u', max_size=8).map(str.encode),
)
def test_mutated_bytes_are_a_manifest_or_an_error_and_nothing_else(at, removed, inserted):
    data = DIGITS.to_bytes()

    assert_parsed_exactly_or_refused(data[:at] + inserted + data[at + removed :])


@given(path=st.sampled_from(PATHS), value=json_values)
def test_a_mutated_value_is_a_manifest_or_an_error_and_nothing_else(path, value):
    values = document()
    put(values, path, value)

    assert_parsed_exactly_or_refused(encode(values))


@given(data=st.binary(max_size=300) | json_values.map(encode))
@example(b"")
@example(b"null")
@example(b"[" * 100_000)
@example(b'{"a":' * 40_000)
@example(b"1" * 5000)
@example(b'"\\ud800"')
@example("{}".encode("utf-16"))
def test_foreign_bytes_are_refused(data):
    with pytest.raises(VerificationError):
        parse_manifest(data)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_no_key_and_no_entry_is_optional_or_of_two_types(path):
    values = document()
    put(values, path, {"surprise": 1})

    with pytest.raises(VerificationError, match="malformed manifest"):
        parse_manifest(encode(values))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version":7', '"version":7.0'),
        ('"version":7', '"version":true'),
        ('"version":7', '"version":0'),
        ('"version":7', '"version":07'),
        ('"version":7', '"version":7,"version":7'),
        ('"version":7', '"version":6,"version":7'),
        ('"version":7', '"version":7,"w":1'),
        ('"version":7', '"version": 7'),
        ('"format":1', '"format":2'),
        ('"format":1', '"format":true'),
        ('"size":7', '"size":-7'),
        ('"name":"model.onnx"', '"name":"../model.onnx"'),
        ('"name":"model.onnx"', '"name":"/etc/passwd"'),
        ('"name":"model.onnx"', '"name":".."'),
        ('"name":"digits"', '"name":"di\\u0067its"'),
        ('"name":"digits"', '"name":""'),
        ('"epsilon":"inf"', '"epsilon":Infinity'),
        ('"epsilon":"inf"', '"epsilon":1e999'),
        ('"epsilon":"inf"', '"epsilon":NaN'),
        ('"epsilon":"inf"', '"epsilon":-1.0'),
        ('"epsilon":"inf"', '"epsilon":"Inf"'),
        ('"epsilon":"inf"', '"epsilon":8'),
        ('"delta":0.0', '"delta":0'),
        ('"delta":0.0', '"delta":0.00'),
        ('"high":1.0', '"high":-1.0'),
        ('"agreement":0.995', '"agreement":1.5'),
        ('"shape":[1,8,8]', '"shape":[]'),
        ('"shape":[1,8,8]', '"shape":[1,8,-8]'),
        ('["0","1",', '["1","1",'),
        ('["0","1",', '["","1",'),
        ('["0","1",', '["\\u0007","1",'),
        ("2026-01-31T12", "2026-02-31T12"),
        ("12:00:00Z", "12:00:00"),
        ('"ab', '"AB'),
        ('"1.22"', '"1.22; rm"'),
    ],
)
def test_each_way_to_write_a_wrong_manifest_is_refused(old, new):
    text = DIGITS.to_bytes().decode()
    assert text.count(old) == 1

    with pytest.raises(VerificationError):
        parse_manifest(text.replace(old, new).encode())


def test_a_manifest_of_any_length_is_refused_without_being_parsed():
    with pytest.raises(VerificationError, match=f"at most {MAX_MANIFEST_BYTES}"):
        parse_manifest(b" " * (MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda: Metrics(1, 1.0, 1.0), "metrics.float_accuracy must be a finite float"),
        (lambda: Metrics(1.0, nan, 1.0), "metrics.int8_accuracy"),
        (lambda: InputSpec((8, 0), 0.0, 1.0), "inputs.shape must be an integer in 1.."),
        (lambda: InputSpec([8], 0.0, 1.0), "inputs.shape must be a tuple"),
        (lambda: Runtime("latest"), "runtime.min_onnxruntime must be like 1.22"),
        (lambda: replace(DIGITS, version=True), "version must be an integer"),
        (lambda: replace(DIGITS.description, labels=("a",)), "labels must be a tuple of 2 to"),
        (lambda: replace(DIGITS.description, labels=("a", "a")), "labels must differ"),
        (lambda: replace(DIGITS.description, name="a/b"), "name must be 1 to 64 letters"),
    ],
)
def test_a_publisher_learns_which_field_is_wrong(build, rule):
    with pytest.raises(ConfigurationError, match=re.escape(rule)):
        build()


def test_an_error_message_stays_short_whatever_it_is_about():
    with pytest.raises(ConfigurationError) as caught:
        replace(DIGITS.description, name="x" * 10_000)

    assert len(str(caught.value)) < 200


def test_a_file_entry_accepts_its_own_contents_only():
    entry = ModelFile.of(b"weights")

    entry.verify(b"weights")
    for other in (b"", b"weight", b"weights!", b"Weights"):
        with pytest.raises(VerificationError, match=r"model\.onnx must have 7 bytes"):
            entry.verify(other)


def test_only_plain_numbers_are_versions():
    assert version_numbers(["2", "10", "1", "01", "1.5", "-3", "٣", "", "latest"]) == [1, 2, 10]
