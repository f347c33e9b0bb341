import io
import json
import subprocess
import sys

import numpy as np
import pytest

from fedcore.device.__main__ import main
from fedcore.device.footprint import foreign_modules, peak_memory_mb

UNIT = np.eye(3, dtype=np.float32)


@pytest.fixture
def arguments(tmp_path, models, key):
    (tmp_path / "key.pem").write_bytes(key.public.to_pem())
    np.savez(tmp_path / "data.npz", x=UNIT, y=[0, 1, 0], reference=[0, 1, 2])
    return {
        "--release": str(models),
        "--key": str(tmp_path / "key.pem"),
        "--data": str(tmp_path / "data.npz"),
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def test_the_command_reports_what_it_measured_in_a_process_of_its_own(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fedcore.device", *flat(arguments), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout)

    assert done.stderr == ""
    assert (report["name"], report["version"], report["predictions"]) == ("tenfold", 2, 3)
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert report["agreement"] == 1
    assert report["out_of_range"] == 0
    assert report["foreign_modules"] == []
    assert 0 < report["latency_ms"] < report["startup_ms"]
    assert 20 < report["ready_memory_mb"] <= report["peak_memory_mb"] < 110


def test_without_labels_there_is_no_accuracy(arguments, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", x=np.concatenate([UNIT, 2 * UNIT]))

    assert main([*flat(arguments), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)

    assert report["accuracy"] is None
    assert report["agreement"] is None
    assert report["predictions"] == 6
    assert report["out_of_range"] == 3


def test_the_report_is_readable_without_json(arguments, capsys):
    assert main(flat(arguments)) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    assert lines["name"] == "tenfold"
    assert lines["accuracy"] == "0.6667"


def test_help_explains_every_option_without_loading_the_runtime():
    script = (
        "import sys; from fedcore.device.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'onnxruntime' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    for word in ("--release", "--key", "--data", "--minimum-version", "--threads", "float32"):
        assert word in done.stdout


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def savez(**arrays):
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "rule"),
    [
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: path.write_bytes(b""), "must be an .npz file"),
        (lambda path: path.write_bytes(b"no zip"), "must be an .npz file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "must be an .npz file"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"NUMPY", b"PYNUM")), "error: "),
        (lambda path: path.write_bytes(npy(UNIT)), "must be an .npz file"),
        (savez(x=np.array([{}])), "must be an .npz file"),
        (savez(y=[1]), "must hold an array x"),
        (savez(x=np.float32(1)), "must hold an array x"),
        (savez(x=UNIT[:0]), "at least one sample"),
        (savez(x=UNIT.astype(float)), "expected float32 inputs of shape [n, 3], found float64"),
        (savez(x=UNIT, y=[1]), "y must hold one integer per sample"),
        (savez(x=UNIT, reference=[1.0, 2.0, 3.0]), "reference must hold one integer per sample"),
    ],
)
def test_an_unusable_data_file_ends_with_one_line_and_status_two(
    arguments, tmp_path, capsys, write, rule
):
    write(tmp_path / "data.npz")

    assert main(flat(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert rule in output.err


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"--release": "nowhere"}, "cannot read the release folder nowhere"),
        ({"--key": "nowhere"}, "cannot read the key file nowhere"),
        ({"--minimum-version": "3"}, "a downgrade is refused"),
        ({"--threads": "0"}, "threads must be at least 1"),
    ],
)
def test_an_unusable_option_ends_with_one_line_and_status_two(arguments, capsys, change, rule):
    assert main(flat(arguments | change)) == 2
    assert rule in capsys.readouterr().err


def test_a_private_key_is_not_taken_for_the_public_one(arguments, tmp_path, key, capsys):
    (tmp_path / "key.pem").write_bytes(key.to_pem())

    assert main(flat(arguments)) == 2
    output = capsys.readouterr().err
    assert "Ed25519 public key" in output
    assert key.seed.hex() not in output


def test_a_changed_release_ends_with_status_two(arguments, models, capsys):
    with (models / "2" / "model.onnx").open("ab") as file:
        file.write(b"!")

    assert main(flat(arguments)) == 2
    assert "model.onnx must have at most" in capsys.readouterr().err


def test_the_memory_record_follows_what_the_process_holds():
    script = (
        "import numpy as np; from fedcore.device.footprint import peak_memory_mb\n"
        "before = peak_memory_mb(); block = np.ones(25_000_000)\n"
        "print(before, peak_memory_mb())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    before, after = map(float, done.stdout.split())

    assert 10 < before < 100
    assert 190 < after - before < 220


def test_the_memory_record_starts_anew_with_the_program():
    block = np.ones(50_000_000)
    script = "from fedcore.device.footprint import peak_memory_mb; print(peak_memory_mb())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert peak_memory_mb() > block.nbytes / 1e6
    assert float(done.stdout) < 100


def test_a_training_library_in_the_process_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)

    assert "torch" in foreign_modules()
