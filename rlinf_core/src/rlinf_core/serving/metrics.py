"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections import OrderedDict

from rlinf_client.timing import Timing

MOST_CLIENTS = 32
"""Clients with their own latencies: the latest."""


class Metrics:
    """Requests by outcome, and latencies of all requests and of each client."""

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = dict.fromkeys(("ok", "refused", "failed", "busy", "malformed"), 0)
        self.clients = 0
        """Connected now."""
        self.latency, self.compute = Timing(), Timing()
        self._by_client: OrderedDict[str, Timing] = OrderedDict()

    def answered(self, client: str, seconds: float, computed: float) -> None:
        """Count a request that got its actions: seconds from its receipt to its reply, and of computing."""
        self.outcomes["ok"] += 1
        self.latency.add(seconds)
        self.compute.add(computed)
        timing = self._by_client.pop(client, None) or Timing()
        timing.add(seconds)
        self._by_client[client] = timing
        if len(self._by_client) > MOST_CLIENTS:
            self._by_client.popitem(last=False)

    def text(self, waiting: int) -> str:
        """In Prometheus' text format."""
        lines = ["# TYPE rlinf_requests_total counter"]
        lines += [f'rlinf_requests_total{{outcome="{name}"}} {count}' for name, count in self.outcomes.items()]
        lines += ["# TYPE rlinf_clients gauge", f"rlinf_clients {self.clients}"]
        lines += ["# TYPE rlinf_waiting_requests gauge", f"rlinf_waiting_requests {waiting}"]
        for name, timing in (("request", self.latency), ("compute", self.compute)):
            lines += [f"# TYPE rlinf_{name}_seconds summary", *_summary(f"rlinf_{name}_seconds", "", timing)]
        lines.append("# TYPE rlinf_client_request_seconds summary")
        for client, timing in self._by_client.items():
            lines += _summary("rlinf_client_request_seconds", f'client="{client}"', timing)
        return "\n".join([*lines, ""])


def _summary(name: str, label: str, timing: Timing) -> list[str]:
    both = f"{label}," if label else ""
    quantiles = [
        f'{name}{{{both}quantile="{at / 100:g}"}} {timing.percentile(at) / 1e3:.6g}' for at in (50, 99) if timing.count
    ]
    own = f"{{{label}}}" if label else ""
    return [*quantiles, f"{name}_sum{own} {timing.total:.6g}", f"{name}_count{own} {timing.count}"]
