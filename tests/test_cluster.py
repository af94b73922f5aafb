"""What the cluster does with messages that cross events; whole sweeps on real Ray are in test_runner.py."""

from types import SimpleNamespace
from typing import Any

from sweep.cluster import Cluster


def test_a_message_to_an_evaluator_that_has_just_died_is_dropped() -> None:
    cluster = Cluster.__new__(Cluster)
    sent: list[Any] = []
    living = SimpleNamespace(send=SimpleNamespace(remote=sent.append))
    cluster._evaluators = {"evaluator.0": living}
    cluster.send("evaluator.0", "first")
    del cluster._evaluators["evaluator.0"]  # as the stream's end does, in the middle of a batch of events
    cluster.send("evaluator.0", "second")
    assert sent == ["first"]
