import numpy as np

from fedcore.pipeline import model_digest

MODEL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3, np.int64)}


def test_equal_models_have_equal_digests_whatever_their_memory_looks_like():
    big_endian = {
        name: array.astype(array.dtype.newbyteorder(">")) for name, array in MODEL.items()
    }
    strided = {"w": np.asfortranarray(MODEL["w"]), "n": MODEL["n"]}
    digests = {model_digest(model) for model in (MODEL, big_endian, strided)}
    assert len(digests) == 1
    assert len(bytes.fromhex(digests.pop())) == 32


def test_models_that_differ_in_anything_have_different_digests():
    w, n = MODEL["w"], MODEL["n"]
    nudged = w.copy()
    nudged[1, 2] = np.nextafter(nudged[1, 2], np.float32(9))
    others = [
        MODEL,
        {"w": nudged, "n": n},
        {"w": w.reshape(3, 2), "n": n},
        {"w": w.ravel(), "n": n},
        {"w": w.astype(np.float64), "n": n},
        {"w": w.view(np.int32), "n": n},
        {"v": w, "n": n},
        {"n": n, "w": w},
        {"w": w},
        {"w": w, "n": np.array([3], np.int64)},
        {"w": -w, "n": n},
        {"w": np.where(w == 0, np.float32(-0.0), w), "n": n},
        {},
    ]
    assert len({model_digest(model) for model in others}) == len(others)
