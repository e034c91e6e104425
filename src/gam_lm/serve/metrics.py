"""What the server counts, for Prometheus. Imports no torch."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("gam_requests", "Requests by route and HTTP status.", ["route", "status"], registry=registry)
        self._tokens = Counter("gam_tokens", "Tokens read from prompts, found in the cache, or drawn.", ["kind"], registry=registry)
        self._drafts = Counter("gam_draft_tokens", "Tokens drafted by prompt lookup, and how many of them were right.", ["kind"], registry=registry)
        self._token_seconds = Histogram("gam_token_seconds", "Time of a drawn token, waiting included.", buckets=SECONDS, registry=registry)
        self._first_seconds = Histogram("gam_first_token_seconds", "Time from a request to its first token.", buckets=SECONDS, registry=registry)
        self._answering = Gauge("gam_requests_answering", "Requests that are being answered.", registry=registry)
        self._waiting = Gauge("gam_requests_waiting", "Requests that are being received or wait for their turn.", registry=registry)
        self._cache_bytes = Gauge("gam_cache_bytes", "Bytes of the states in the prefix cache.", registry=registry)
        self._cache_states = Gauge("gam_cache_states", "States in the prefix cache.", registry=registry)

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def tokens(self, kind: str, number: int) -> None:
        """Tokens of a ``kind``: prompt, cached or drawn."""
        self._tokens.labels(kind).inc(number)

    def drawn(self, number: int, seconds: float) -> None:
        """Tokens that were drawn in one turn."""
        self.tokens("drawn", number)
        for _ in range(number):
            self._token_seconds.observe(seconds / number)

    def drafts(self, drafted: int, agreed: int) -> None:
        """Drafts of an answer that has ended."""
        self._drafts.labels("drafted").inc(drafted)
        self._drafts.labels("agreed").inc(agreed)

    def first_token(self, seconds: float) -> None:
        """Time from a request to its first token."""
        self._first_seconds.observe(seconds)

    def cache(self, nbytes: int, states: int) -> None:
        """What the prefix cache holds."""
        self._cache_bytes.set(nbytes)
        self._cache_states.set(states)

    def text(self, *, answering: int, waiting: int) -> bytes:
        """All figures in the format that Prometheus reads."""
        self._answering.set(answering)
        self._waiting.set(waiting)
        return generate_latest(self._registry)
