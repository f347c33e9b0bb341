"""Bytes of a run in the words of `metrics.jsonl` and `summary.json`, beside float32.

All of them are lengths of messages that were really sent (`fedcore.telemetry.Traffic`):

    uplink      from the clients        payload     the update, or the model, alone
    downlink    to the clients          overhead    keys, shares, metrics, names, plans
    total       both                    no word     payload and overhead together

`..._per_client_round` is a mean: of the uplink over updates that arrived, of the downlink
over models that were sent. The total is charged to the updates that arrived: what lost
clients, second tries and aborted attempts cost counts against them. So `total_reduction`
is a model and an update in float32 over all that it took to get one update.
"""

from __future__ import annotations

from fedcore.telemetry import Traffic

FLOAT_BYTES = 4


def round_bytes(traffic: Traffic) -> dict[str, int]:
    """Return the sums over one round's clients, or over a run's rounds.

    Example:
        >>> sums = round_bytes(Traffic(up_payload=8, up_total=10, down_payload=40, down_total=45))
        >>> sums["uplink_overhead_bytes"], sums["downlink_overhead_bytes"], sums["total_bytes"]
        (2, 5, 55)
    """
    up, down = traffic.up_payload, traffic.down_payload
    return {
        "uplink_payload_bytes": up,
        "uplink_overhead_bytes": traffic.up_total - up,
        "uplink_bytes": traffic.up_total,
        "downlink_payload_bytes": down,
        "downlink_overhead_bytes": traffic.down_total - down,
        "downlink_bytes": traffic.down_total,
        "total_bytes": traffic.up_total + traffic.down_total,
        "uploads": traffic.uploads,
        "downloads": traffic.downloads,
    }


def run_bytes(
    traffic: Traffic, parameters: int, *, up: int | None = None, down: int | None = None
) -> dict[str, object]:
    """Return means for a client and round, and how many times smaller than float32 they are.

    Args:
        traffic: Of all rounds.
        parameters: Weights of the first model, which reductions refer to.
        up: Weights of all models that updates were of, if some of them were smaller.
        down: The same of all models that were sent.

    Example:
        >>> sent = Traffic(up_payload=50, up_total=60, down_payload=100, down_total=140,
        ...                uploads=1, downloads=1)
        >>> means = run_bytes(sent, 100)
        >>> means["uplink_reduction"], means["downlink_reduction"], means["total_reduction"]
        (6.667, 2.857, 4.0)
    """
    model = FLOAT_BYTES * parameters
    up_payload, down_payload = traffic.up_payload, traffic.down_payload
    uplink = _direction("uplink", up_payload, traffic.up_total, traffic.uploads, model)
    downlink = _direction("downlink", down_payload, traffic.down_total, traffic.downloads, model)
    payload, total = up_payload + down_payload, traffic.up_total + traffic.down_total
    both = _direction("total", payload, total, traffic.uploads, 2 * model)
    return {
        **uplink,
        "uplink_bits_per_parameter": _bits(
            up_payload, traffic.uploads * parameters if up is None else up
        ),
        **downlink,
        "downlink_bits_per_parameter": _bits(
            down_payload, traffic.downloads * parameters if down is None else down
        ),
        **both,
        "traffic": round_bytes(traffic),
    }


def _direction(
    name: str, payload: int, total: int, messages: int, reference: int
) -> dict[str, float | None]:
    """Return the means of one direction; no reduction if nothing was sent, or nothing arrived."""
    count = max(1, messages)

    def reduction(size: int) -> float | None:
        return round(reference * messages / size, 3) if size and messages else None

    return {
        f"{name}_bytes_per_client_round": round(total / count, 1),
        f"{name}_payload_bytes_per_client_round": round(payload / count, 1),
        f"{name}_overhead_bytes_per_client_round": round((total - payload) / count, 1),
        f"{name}_reduction": reduction(total),
        f"{name}_payload_reduction": reduction(payload),
    }


def _bits(payload: int, weights: int) -> float:
    return round(8 * payload / max(1, weights), 4)
