"""Watchdog, with a clock that the test advances."""

import pytest

from serve.engine.watchdog import Watchdog


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self._now)

    def expires(self, watchdog: Watchdog, seconds: float, since: float | None) -> bool:
        """The result of a check, `seconds` later."""
        self._now += seconds
        return watchdog.expires(since)


def test_watchdog_expires_for_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watchdog = Watchdog(3, interval=1)
    assert [clock.expires(watchdog, 0.75, 100.0) for _ in range(6)] == [False] * 5 + [True]


def test_watchdog_ignores_steps_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watchdog = Watchdog(3, interval=1)
    assert not any(clock.expires(watchdog, 0.75, 100.0 + i // 4) for i in range(40))
    assert not any(clock.expires(watchdog, 0.75, None) for i in range(40))


@pytest.mark.parametrize("limit", [1, 3, 300])
def test_watchdog_discounts_a_pause(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watchdog = Watchdog(limit, interval=1)
    for since in (100.0, 5000.0):
        assert not clock.expires(watchdog, 0.1, since)
        assert not clock.expires(watchdog, 4000, since)
    seconds = 0.1
    while not clock.expires(watchdog, 0.1, 5000.0):
        seconds += 0.1
    assert limit - 1.2 < seconds < limit + 0.2


def test_watchdog_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watchdog = Watchdog(0, interval=1)
    assert not any(clock.expires(watchdog, 100, 100.0) for _ in range(10))
