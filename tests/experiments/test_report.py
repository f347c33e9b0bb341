import base64
import json
import re
import subprocess
import sys
from io import BytesIO

import pytest
from matplotlib.image import imread

from experiments import plots
from experiments.report import main, write_report
from experiments.run_files import read_run
from fedcore.errors import ConfigurationError
from fedcore.privacy import PrivacyLedger, Release

PICTURES = ("accuracy", "accuracy_by_bytes", "bytes", "epsilon")
PNG = b"\x89PNG\r\n\x1a\n"


def line(number, **changes):
    return {
        "round": number, "accuracy": 0.5 + number / 100, "loss": 0.7, "train_accuracy": None,
        "train_loss": None, "invited": 10, "survivors": 9, "lost": {"upload": 1}, "attempts": 1,
        "aborted": [], "clipped": 3, "uplink_bytes": 90_000, "uplink_payload_bytes": 72_000,
        "downlink_bytes": 400_000, "uploads": 9, "epsilon": 1.0, "seconds": 1.5 * number,
    } | changes  # fmt: skip


def summary(**changes):
    return {
        "experiment": "tiny", "seed": 3, "rounds": 4, "completed_rounds": 4, "stopped": None,
        "clients": 20, "clients_per_round": 10, "parameters": 10_000, "initial_accuracy": 0.1234,
        "accuracy": 0.8766, "loss": 0.4321, "uplink_bytes_per_client_round": 10_120.0,
        "uplink_payload_bytes_per_client_round": 8_000.0, "uplink_bits_per_parameter": 6.4,
        "uplink_reduction": 3.953, "uplink_payload_reduction": 5.05,
        "downlink_bytes_per_client_round": 41_300.0, "downlink_reduction": 0.969,
        "secagg": {"protocol": "bonawitz", "neighbours": 8, "threshold": 5, "dropped_clients": 6,
                   "aborted_rounds": 1},
        "epsilon": 1.0, "delta": 1e-5, "seconds_total": 12.25, "clients_per_second": 3.37,
        "peak_memory_mb": 654.0,
        "release": {"path": "outputs/tiny/model/7", "version": 7, "onnx_bytes": 23_400,
                    "agreement": 0.9912, "float_accuracy": 0.8766, "int8_accuracy": 0.8642,
                    "device_latency_ms": 0.17, "device_peak_memory_mb": 63.0},
    } | changes  # fmt: skip


def release(number, **changes):
    values = {
        "round_number": number, "unit": "device", "mechanism": "distributed_gaussian",
        "noise_multiplier": 12.0, "norm": 100.0, "sigma_local": 400.0, "dim": 2_000, "clients": 10,
        "survivors": 9, "sampling": "fixed_size_without_replacement",
    } | changes  # fmt: skip
    return Release(**values)


def write(folder, values, lines, ledger, overrides=()):
    (folder / ".hydra").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (folder / "ledger.json").write_text(ledger.to_json())
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(list(overrides)))
    return folder


@pytest.fixture
def private(tmp_path):
    """Four rounds with masks and noise; the second one is aborted."""
    ledger, lines = PrivacyLedger(delta=1e-5, epsilon_budget=3.0), []
    for number in (1, 2, 3, 4):
        aborted = number == 2
        if not aborted:
            ledger = ledger.record(release(number))
        changes = {"survivors": 0, "lost": {"upload": 3}, "aborted": ["too few"]} if aborted else {}
        lines.append(line(number, epsilon=ledger.epsilon, **changes))
    values = summary(epsilon=ledger.epsilon)
    return write(tmp_path / "private", values, lines, ledger, ["experiment=tiny", "seed=3"])


@pytest.fixture
def plain(tmp_path):
    """Two rounds of float32 in the clear, without a release."""
    values = summary(
        rounds=2, completed_rounds=2, epsilon="inf", delta=None, secagg=None, release=None,
        uplink_bytes_per_client_round=40_100.0, uplink_payload_bytes_per_client_round=40_000.0,
        uplink_bits_per_parameter=32.0, uplink_reduction=0.998, uplink_payload_reduction=1.0,
    )  # fmt: skip
    lines = [line(1, epsilon="inf", train_accuracy=0.6), line(2, epsilon="inf", accuracy=None)]
    return write(tmp_path / "plain", values, lines, PrivacyLedger(delta=1e-5))


@pytest.fixture
def empty(tmp_path):
    """Interrupted in its first round; nothing but the summary says so."""
    nothing = dict.fromkeys(
        ("uplink_reduction", "uplink_payload_reduction", "downlink_reduction", "release")
    )
    sent = dict.fromkeys((key for key in summary() if "bytes_per" in key or "bits_per" in key), 0.0)
    values = summary(completed_rounds=0, stopped="interrupted", accuracy=0.1234, **nothing, **sent)
    folder = write(tmp_path / "empty", values, [], PrivacyLedger(delta=1e-5))
    (folder / "ledger.json").unlink()
    return folder


def page(folder):
    return write_report(folder).read_text(encoding="utf-8")


def words(folder):
    """Return what a reader sees, in one line."""
    body = re.sub(r"</?(code|span|strong|sup)\b[^>]*>", "", page(folder).partition("</style>")[2])
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def cards(folder):
    found = re.findall(
        r'<dt>(.*?)</dt>\s*<dd><span class="value">(.*?)</span><span class="note">(.*?)</span>',
        page(folder),
        re.DOTALL,
    )
    return {title: (value, " ".join(note.split())) for title, value, note in found}


def states(folder):
    return re.findall(r'class="state (\w+)"', page(folder))


def test_every_headline_figure_of_a_private_run_is_on_a_card(private):
    epsilon = read_run(private).summary.epsilon
    shown = cards(private)

    assert shown["Test accuracy"] == ("87.7%", "from 12.3% before training; loss 0.432")
    assert shown["Differential privacy"] == (f"ε = {epsilon:.3g}", "at δ = 1e-5, for each device")
    assert shown["Update payload"] == (
        "5.05× smaller",
        "6.4 bits for each weight; float32 takes 32",
    )
    assert shown["Sent each round"][0] == "10.1 kB"
    assert shown["Sent each round"][1].endswith("3.95× less than float32")
    assert shown["Received each round"][0] == "41.3 kB"
    assert shown["Received each round"][1].endswith("3% more than float32")
    assert shown["Dropped clients recovered"] == (
        "3",
        "of 6 that dropped out; 1 round aborted, revealing nothing",
    )
    assert shown["Released model"][0] == "23.4 kB"
    assert "version 7" in shown["Released model"][1]
    assert "99.1%" in shown["Released model"][1]
    assert shown["Training time"][0] == "12.2 s"
    assert "3.37 clients" in shown["Training time"][1]
    assert "654 MB" in shown["Training time"][1]


def test_a_private_run_is_protected_in_every_row(private):
    assert states(private) == ["on"] * 5
    assert "masks with 8 others; it takes 5 shares" in words(private)
    assert "Discrete Gaussian noise of 12 times the most that one device" in words(private)


def test_a_plain_run_says_what_is_missing_and_how_to_turn_it_on(plain):
    assert states(plain) == ["off", "off", "on", "off", "off"]
    assert cards(plain)["Differential privacy"][0] == "ε = ∞"
    assert cards(plain)["Update payload"][0] == "as float32"
    assert cards(plain)["Sent each round"][1].endswith("the same as float32")
    assert cards(plain)["Clients that dropped out"][0] == "2"
    assert cards(plain)["Released model"][0] == "none"
    for choice in (
        "secagg=bonawitz",
        "privacy=distributed_gaussian",
        "quantize=modular quantize.bits=12 or sparsify=random_k",
        "release=onnx_int8",
    ):
        assert f"Turn it on with {choice}" in words(plain)


def test_the_ledger_is_told_in_words_and_composed_again(private):
    text = words(private)

    assert "Round 4. The sum of 9 of 10 invited devices, 2,000 numbers" in text
    assert "Round 2." not in text
    assert "The budget is ε = 3" in text
    assert f"they cost ε = {read_run(private).ledger.epsilon:.3g} at δ = 1e-5, as the run" in text


def test_an_epsilon_that_the_ledger_does_not_support_is_called_out(private):
    (private / "summary.json").write_text(json.dumps(summary(epsilon=0.001)))
    assert "The ledger does not support the stated epsilon" in words(private)

    (private / "ledger.json").unlink()
    assert "no release that would bound it" in words(private)


def test_a_run_that_revealed_nothing_spent_nothing(private):
    lines = [line(1, survivors=0, epsilon=0.0, accuracy=None)]
    (private / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    (private / "ledger.json").write_text(PrivacyLedger(delta=1e-5).to_json())
    (private / "summary.json").write_text(
        json.dumps(summary(rounds=1, completed_rounds=1, epsilon=0.0, release=None))
    )

    assert cards(private)["Differential privacy"][0] == "ε = 0"
    assert "does not support" not in words(private)


def test_noise_of_local_training_protects_examples_not_devices(private):
    ledger = PrivacyLedger(delta=1e-5).record(
        release(
            4, unit="example", mechanism="gaussian", noise_multiplier=1.5, sigma_local=0.0,
            clients=1, survivors=1, sampling="poisson", sampling_rate=0.05, steps=24,
            amplification_claimed=True,
        )
    )  # fmt: skip
    (private / "ledger.json").write_text(ledger.to_json())
    (private / "summary.json").write_text(json.dumps(summary(epsilon=ledger.epsilon)))
    text = words(private)

    assert cards(private)["Differential privacy"][1] == "at δ = 1e-5, for each training example"
    assert "24 steps of local training, each with Gaussian noise of 1.5 times" in text
    assert "A device's data as a whole is not hidden." in text


def test_the_examples_ledger_must_support_what_was_noted_of_them(private):
    examples = PrivacyLedger(delta=1e-5).record(
        release(4, unit="example", mechanism="gaussian", sigma_local=0.0, clients=1, survivors=1)
    )
    (private / "ledger_example.json").write_text(examples.to_json())
    noted = read_run(private).ledger.epsilon
    for claimed, supported in ((examples.epsilon, True), (examples.epsilon / 2, False)):
        values = summary(epsilon=noted, epsilon_example=claimed, delta_example=1e-5)
        (private / "summary.json").write_text(json.dumps(values))
        assert ("does not support" not in words(private)) == supported
    assert cards(private)["And for each example"][0].startswith("ε = ")


def test_a_noise_that_was_found_is_shown_beside_its_target(private):
    values = summary(
        epsilon=read_run(private).ledger.epsilon, unit="device", epsilon_target=2.5,
        noise_multiplier=12.0, noise_inflation=1.016, warnings=["privacy.delta=1 is large"],
    )  # fmt: skip
    (private / "summary.json").write_text(json.dumps(values))
    text = words(private)
    assert "within the target of ε = 2.5 was found before training: 12 times the most" in text
    assert "1.016 times as large as the noise of the central Gaussian mechanism" in text
    assert "Privacy parameters. privacy.delta=1 is large" in text


def test_an_epsilon_that_promises_nothing_is_not_praised(private):
    ledger = PrivacyLedger(delta=1e-5).record(
        release(1, noise_multiplier=0.1, norm=100.0, sigma_local=4.0)
    )
    (private / "ledger.json").write_text(ledger.to_json())
    (private / "summary.json").write_text(json.dumps(summary(epsilon=ledger.epsilon)))

    assert "change by a factor" not in words(private)
    assert "the guarantee is one in name only" in words(private)


def test_an_interrupted_run_is_reported_as_far_as_it_came(private):
    with (private / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "accur')
    values = summary(rounds=40, stopped="interrupted", release=None)
    (private / "summary.json").write_text(json.dumps(values))
    text = words(private)

    assert "Stopped after 4 of 40 rounds. Reason: interrupted" in text
    assert "The run ended before a model was released." in text
    assert "All 4 rounds" in text


def test_a_record_that_was_cut_off_is_called_incomplete(private):
    lines = (private / "metrics.jsonl").read_text().splitlines(keepends=True)
    (private / "metrics.jsonl").write_text("".join(lines[:3]))

    assert "metrics.jsonl holds 3 rounds, summary.json counts 4" in words(private)


def test_a_run_without_a_round_has_a_report(empty):
    text = words(empty)

    assert cards(empty)["Test accuracy"] == ("12.3%", "the untrained model: no round was finished")
    assert cards(empty)["Differential privacy"][0] == "ε = 0"
    assert "Stopped before a round was finished. Reason: interrupted" in text
    assert states(empty) == ["on", "idle", "on", "idle", "idle"]


def test_a_run_that_ended_before_it_began_has_a_report(tmp_path):
    values = {"completed_rounds": 0, "stopped": "before the first round"}
    (tmp_path / "summary.json").write_text(json.dumps(values))

    assert "Reason: before the first round" in words(tmp_path)
    assert set(states(tmp_path)) == {"idle"}


def test_what_a_user_wrote_is_escaped(private):
    attack = "name=<script>alert('x')</script>"
    (private / ".hydra" / "overrides.yaml").write_text(json.dumps([attack]))
    values = summary(experiment="<b>bold</b>", stopped="<i>why</i>")
    (private / "summary.json").write_text(json.dumps(values))
    html = page(private)

    assert not re.search(r"<(script|b|i)\b", html)
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;bold" in html


def test_the_page_needs_no_other_file(private):
    html = page(private)
    sources = re.findall(r'<img src="(.*?)"', html)

    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r'(href|src)="(?!data:)', html)
    assert {base64.b64decode(source.partition(",")[2]) for source in sources} == {
        (private / f"{name}.png").read_bytes() for name in PICTURES
    }


@pytest.mark.parametrize("name", ["private", "plain", "empty"])
def test_the_pictures_are_valid(name, request):
    folder = request.getfixturevalue(name)
    write_report(folder)

    for picture in PICTURES:
        pixels = imread(folder / f"{picture}.png")
        assert pixels.shape[:2] == (666, 1080)
        assert pixels[..., :3].std() > 0.01


def adapt(folder, clips):
    """Note a clip, and the fraction that fitted it, in every round."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry, (norm, fitted) in zip(lines, clips, strict=True):
        entry |= {"clip_norm": norm, "unclipped": fitted}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def test_a_clip_that_moved_is_drawn_and_listed(private):
    adapt(private, [(0.1, -0.02), (0.1, None), (0.125, 0.4), (0.125, 1.03)])
    text = words(private)
    assert "The clip, which follows a quantile" in text
    assert "an estimate: the devices' answers have the noise of the sum" in text
    assert "Clipped Clip" in text
    assert (private / "clip.png").read_bytes().startswith(PNG)
    pixels = imread(private / "clip.png")
    assert pixels.shape[:2] == (666, 1080)
    assert page(private).count("<img src") == 5


def test_without_noise_the_report_calls_the_fraction_exact(plain):
    adapt(plain, [(0.1, 0.2), (0.2, 0.4)])
    assert "is exact, from the tally inside the sum" in words(plain)


def test_a_clip_that_stayed_is_not_drawn(private):
    adapt(private, [(0.1, None)] * 4)
    assert "follows a quantile" not in words(private)
    assert not (private / "clip.png").exists()


def test_rounds_without_a_clip_have_an_empty_picture_of_it():
    assert plots.clip_over_rounds([]).startswith(PNG)
    assert plots.clip_over_rounds([(1, 0.1, None), (2, 0.3, None)]).startswith(PNG)


def test_equal_runs_have_equal_reports(private):
    assert page(private) == page(private)


def test_the_command_to_repeat_a_run_leaves_out_its_folder(private):
    overrides = ["experiment=tiny", "output=/somewhere", "+name=two words"]
    (private / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))

    assert (
        read_run(private).command == "python -m experiments.train experiment=tiny '+name=two words'"
    )


def test_a_client_that_is_asked_twice_pays_twice(private):
    run = read_run(private)
    (private / "metrics.jsonl").write_text(json.dumps(line(1, attempts=2, uploads=18)) + "\n")

    assert run.rounds[0].client_bytes == 10_000
    assert read_run(private).rounds[0].client_bytes == 10_000
    assert cards(private)["Dropped clients recovered"][0] == "1"


def test_a_run_that_lost_nobody_says_so(private):
    (private / "metrics.jsonl").write_text(json.dumps(line(1, lost={}, survivors=10)) + "\n")

    assert "No client dropped out; 1 round lost" in words(private)


def test_a_loss_that_diverged_is_shown_as_a_dash(plain):
    (plain / "metrics.jsonl").write_text(json.dumps(line(1, loss=float("nan"))) + "\n")

    assert "<td>–</td>" in page(plain)


def spoiled(path, text):
    def spoil(folder):
        (folder / path).write_text(text)

    return spoil


def removed(path):
    return lambda folder: (folder / path).unlink()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (removed("summary.json"), "must hold summary.json"),
        (removed("metrics.jsonl"), "must hold metrics.jsonl with the 4 rounds"),
        (spoiled("summary.json", "{"), "summary.json must be JSON"),
        (spoiled("summary.json", "[]"), "summary.json must be a JSON object, found list"),
        (spoiled("summary.json", "{}"), "summary.json: experiment: Field required"),
        (spoiled("summary.json", json.dumps(summary(seed="x"))), "summary.json: seed: .*got 'x'"),
        (spoiled("summary.json", json.dumps(summary(accuracy=1.5))), r"accuracy must be in \[0, 1"),
        (spoiled("summary.json", json.dumps(summary(epsilon=-1))), "epsilon must be in"),
        (spoiled("metrics.jsonl", "nonsense\n"), "metrics.jsonl, line 1 must be JSON"),
        (spoiled("metrics.jsonl", "{}\n"), "metrics.jsonl, line 1: round: Field required"),
        (spoiled("metrics.jsonl", 2 * (json.dumps(line(1)) + "\n")), "count its rounds upwards"),
        (spoiled("ledger.json", "{}"), "ledger.json: ledger must be an object"),
        (spoiled(".hydra/overrides.yaml", "a: b"), "overrides.yaml must be a list of strings"),
        (spoiled(".hydra/overrides.yaml", "[a"), "overrides.yaml must be YAML"),
        (spoiled(".hydra/overrides.yaml", "[" * 3000), "overrides.yaml must be YAML"),
        (spoiled(".hydra/overrides.yaml", "[2001-99-99]"), "overrides.yaml must be YAML"),
    ],
)
def test_a_malformed_folder_is_refused(private, spoil, problem, capsys):
    spoil(private)
    with pytest.raises(ConfigurationError, match=problem):
        write_report(private)

    assert not (private / "report.html").exists()
    assert main([str(private)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_the_command_prints_the_path_of_the_page(private, capsys):
    assert main([str(private)]) == 0

    assert capsys.readouterr().out == f"{private / 'report.html'}\n"
    assert (private / "report.html").is_file()


def test_a_folder_that_does_not_exist_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2

    assert "found no folder there" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_a_configuration_error(private):
    (private / "report.html").mkdir()
    with pytest.raises(ConfigurationError, match="cannot write the report"):
        write_report(private)


def test_help_explains_the_folder_without_loading_what_draws():
    script = (
        "import sys; from experiments.report import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'matplotlib', 'jinja2', 'torch', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    for word in ("FOLDER", "summary.json", "report.html", "Exit status"):
        assert word in done.stdout


def test_without_a_folder_the_command_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "usage: python -m experiments.report" in done.stderr


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.accuracy_over_rounds([(0, 0.1), (1, float("nan")), (2, 0.3)], [(2, 0.4)]),
        lambda: plots.accuracy_over_rounds([(number, 0.5) for number in range(200)], []),
        lambda: plots.accuracy_over_rounds([], [(1, 0.5)]),
        lambda: plots.accuracy_over_bytes([(1e3, 0.1), (2e9, 0.3)], 5e3),
        lambda: plots.accuracy_over_bytes([(1e3, 0.5)], 1e3),
        lambda: plots.epsilon_over_rounds([(1, 0.0)], delta=None, budget=None),
        lambda: plots.epsilon_over_rounds([(1, 0.5), (2, 0.9)], delta=1e-6, budget=100.0),
        lambda: plots.bytes_of_one_round(10.0, 5.0, 1e12),
    ],
)
def test_a_picture_copes_with_unusual_numbers(draw):
    png = draw()

    assert png.startswith(PNG)
    assert imread(BytesIO(png)).shape[:2] == (666, 1080)


def test_drawing_touches_no_global_state_of_matplotlib():
    script = (
        "import sys, matplotlib; from experiments import plots\n"
        "before = matplotlib.rcParams.copy()\n"
        "plots.accuracy_over_rounds([(0, 0.1), (1, 0.5)], [(1, 0.6)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "changed = [key for key in before if key != 'backend'"  # to read it would load pyplot
        " and before[key] != matplotlib.rcParams[key]]\n"
        "assert len(before) > 100 and not changed, changed"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_infinite_epsilon_is_said_not_drawn():
    words_only = plots.epsilon_over_rounds([(1, float("inf"))], delta=None, budget=None)
    more_rounds = plots.epsilon_over_rounds([(1, 0.5), (9, float("inf"))], delta=1e-5, budget=2.0)

    assert words_only == more_rounds
