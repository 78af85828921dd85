"""What a run shows: a bar on stderr while it goes on, a summary on stdout when it ends."""

from __future__ import annotations

from tqdm import tqdm

from server.batch.runner import Tally


class Progress:
    """Lines done of all, and tokens a second. Shows nothing when `total` is None."""

    def __init__(self, tally: Tally, total: int | None) -> None:
        self._tally = tally
        self._bar = tqdm(total=total, desc="run-batch", unit="line", mininterval=0.5, disable=total is None)

    def update(self) -> None:
        """Call after each line; draws twice a second at most."""
        if self._bar.disable:
            return
        tally = self._tally
        seconds = max(tally.seconds, 1e-3)
        self._bar.set_postfix_str(
            f"failed {tally.failed}, in {tally.tokens_in / seconds:.0f} tok/s, out {tally.tokens_out / seconds:.0f}",
            refresh=False,
        )
        self._bar.update(tally.done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def render_summary(tally: Tally) -> str:
    """A line for each number."""
    seconds = tally.seconds
    rate_in, rate_out = (count / max(seconds, 1e-3) for count in (tally.tokens_in, tally.tokens_out))
    skipped = "answered by an earlier run"
    if tally.skipped_failed:
        skipped += f", {tally.skipped_failed} of them without success: --retry-failed runs them again"
    rows = [
        ("lines", f"{tally.done}"),
        ("ok", f"{tally.ok}"),
        ("failed", f"{tally.failed}"),
        ("skipped", f"{tally.skipped}" + (f" ({skipped})" if tally.skipped else "")),
        ("tokens in", f"{tally.tokens_in} ({rate_in:.1f}/s)"),
        ("tokens out", f"{tally.tokens_out} ({rate_out:.1f}/s)"),
        ("seconds", f"{seconds:.1f}"),
    ]
    return "\n".join(f"{name:<12}{value}" for name, value in rows)
