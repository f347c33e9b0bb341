"""A wrong clock for the Python processes that have this folder on their path.

Only what Python asks is wrong, not the kernel: unlike a preloaded library this needs no
compiler. TLS, which asks in C, keeps the right time.
"""

import datetime as dt
import os
import time

_skew = float(os.environ.get("CHAOS_SKEW_SECONDS", "0"))
_time, _time_ns = time.time, time.time_ns


class _Skewed(dt.datetime):
    @classmethod
    def now(cls, tz=None):
        return dt.datetime.fromtimestamp(_time() + _skew, tz)

    @classmethod
    def utcnow(cls):
        return dt.datetime.fromtimestamp(_time() + _skew, dt.UTC).replace(tzinfo=None)


if _skew:
    time.time = lambda: _time() + _skew
    time.time_ns = lambda: _time_ns() + int(_skew * 1e9)
    dt.datetime = _Skewed
