"""The table of the samplers' speed."""

from experiments import bench_noise
from fedcore.privacy import discrete_gaussian_table


def test_the_table_states_speed_and_distance_of_every_sampler(monkeypatch):
    monkeypatch.setattr(bench_noise, "SIGMAS", (2.0,))
    monkeypatch.setattr(bench_noise, "SAMPLES", 1000)
    rows = bench_noise.measure_noise(repetitions=1)
    assert [row["noise"] for row in rows] == [
        "discrete gaussian, table",
        "skellam, table",
        "rint(normal), no proof",
    ]
    assert rows[0]["distance"] == discrete_gaussian_table(2.0).distance
    # (1 + e^10) * 10^11 samples * less than 2^-120 each.
    assert 0 < rows[0]["charge"] < 2.3e4 * 1e11 * 2**-120
    assert all(row["nanoseconds"] > 0 for row in rows)
