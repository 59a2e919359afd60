"""What Prometheus can read at the server's ``/metrics``: requests, tokens, waiting, loads, models.

The figures belong to one registry and are shown in ``prometheus_client``'s default registry, which Jupyter serves, as
long as that one lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, get_args

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmkit.inference.running import Running
from llmkit.schemas import Model, Outcome, Status

_SHORT: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LONG: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LOADS: Final = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class _OfModel:
    """The figures of one model, found once: every request passes here."""

    __slots__ = ("completion_tokens", "first_token", "outcomes", "prompt_tokens", "queue", "total")

    def __init__(self, metrics: Metrics, model_id: str) -> None:
        self.outcomes = {outcome: metrics.requests.labels(model_id, outcome) for outcome in get_args(Outcome)}
        self.prompt_tokens = metrics.prompt_tokens.labels(model_id)
        self.completion_tokens = metrics.completion_tokens.labels(model_id)
        self.queue = metrics.queue.labels(model_id)
        self.first_token = metrics.first_token.labels(model_id)
        self.total = metrics.total.labels(model_id)


class Metrics(Collector):
    """The figures of one registry.

    Parameters
    ----------
    models
        Gives every model as it is now; asked when the figures are read.
    """

    def __init__(self, models: Callable[[], Sequence[Model]]) -> None:
        self._models = models
        self._of_model: dict[str, _OfModel] = {}
        self._statuses: dict[str, Status] = {}
        self._shown = False
        self.requests = Counter(
            "llmkit_requests", "Requests that are over, by outcome.", ["model", "outcome"], registry=None
        )
        self.prompt_tokens = Counter("llmkit_prompt_tokens", "Tokens of prompts.", ["model"], registry=None)
        self.completion_tokens = Counter("llmkit_completion_tokens", "Tokens of answers.", ["model"], registry=None)
        self.queue = Histogram("llmkit_queue_seconds", "Waiting for a place.", ["model"], registry=None, buckets=_SHORT)
        self.first_token = Histogram(
            "llmkit_first_token_seconds",
            "From the request to the first token of a stream.",
            ["model"],
            registry=None,
            buckets=_SHORT,
        )
        self.total = Histogram(
            "llmkit_request_seconds", "From the request to its end.", ["model"], registry=None, buckets=_LONG
        )
        self.loads = Counter("llmkit_loads", "Loads that are over, by outcome.", ["model", "outcome"], registry=None)
        self.load_seconds = Histogram(
            "llmkit_load_seconds", "Duration of loads that went well.", ["model"], registry=None, buckets=_LOADS
        )

    # -- noting --------------------------------------------------------------------------------------------

    def request_is_over(self, running: Running, outcome: Outcome, seconds: float) -> None:
        """Count a request of a model, that has taken so long."""
        of_model = self._of_model.get(running.model_id)
        if of_model is None:
            of_model = self._of_model[running.model_id] = _OfModel(self, running.model_id)
        of_model.outcomes[outcome].inc()
        if running.sent is not None:
            of_model.queue.observe(running.queue)
            of_model.total.observe(seconds)
        if running.first_token is not None:
            of_model.first_token.observe(running.first_token - running.start)
        usage = running.usage
        if usage is not None:
            of_model.prompt_tokens.inc(usage.prompt_tokens or 0)
            of_model.completion_tokens.inc(usage.completion_tokens or 0)

    def model_has_changed(self, model_id: str, status: Status, load_seconds: float | None) -> None:
        """Count a load that is over."""
        before = self._statuses.get(model_id)
        self._statuses[model_id] = status
        if before == "loading" and status in ("loaded", "failed", "unloaded"):
            outcome = {"loaded": "ok", "failed": "failed", "unloaded": "cancelled"}[status]
            self.loads.labels(model_id, outcome).inc()
            if status == "loaded" and load_seconds is not None:
                self.load_seconds.labels(model_id).observe(load_seconds)

    def forget(self, model_id: str) -> None:
        """Leave out a model that was deleted: the names that people once gave are not to fill memory."""
        self._of_model.pop(model_id, None)
        self._statuses.pop(model_id, None)
        for metric in self._all():
            metric.remove_by_labels({"model": model_id})

    def _all(self) -> tuple[Counter | Histogram, ...]:
        return (
            self.requests,
            self.prompt_tokens,
            self.completion_tokens,
            self.queue,
            self.first_token,
            self.total,
            self.loads,
            self.load_seconds,
        )

    # -- showing -------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Let ``/metrics`` have the figures."""
        REGISTRY.register(self)
        self._shown = True

    def hide(self) -> None:
        """Take them back, if they were shown; they stay as they are."""
        if self._shown:
            REGISTRY.unregister(self)
            self._shown = False

    def describe(self) -> Iterable[Metric]:
        """Give nothing: two registries in one process, as in tests, are no conflict."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Give every figure, as `prometheus_client` asks for them."""
        for metric in self._all():
            yield from metric.collect()
        yield from gauges(self._models())


def gauges(models: Sequence[Model]) -> list[Metric]:
    """Give what is true of models now."""
    in_flight = GaugeMetricFamily("llmkit_requests_in_flight", "Requests that run.", labels=["model"])
    queued = GaugeMetricFamily("llmkit_requests_queued", "Requests that wait.", labels=["model"])
    status = GaugeMetricFamily("llmkit_model_status", "1 for the status of a model.", labels=["model", "status"])
    memory = GaugeMetricFamily(
        "llmkit_model_memory_bytes", "What a model held when it was last measured.", labels=["model", "kind"]
    )
    for model in models:
        in_flight.add_metric([model.model_id], model.in_flight)
        queued.add_metric([model.model_id], model.queued)
        for one in get_args(Status):
            status.add_metric([model.model_id, one], model.status == one)
        for kind, held in (("ram", model.memory.pss_bytes), ("gpu", model.memory.gpu_bytes)):
            if held is not None:
                memory.add_metric([model.model_id, kind], held)
    return [in_flight, queued, status, memory]
