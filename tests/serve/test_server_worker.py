"""What the event loop keeps of a job."""

from __future__ import annotations

import asyncio

import pytest

from nanokimi.inference.engine import GenerationArguments, Token
from nanokimi.inference.options import SamplingOptions
from nanokimi.serve.api import ApiError
from nanokimi.serve.metrics import Histogram, Metrics
from nanokimi.serve.worker import End, Job, Update


def job_of(choices: int) -> Job:
    return Job([GenerationArguments((1,), SamplingOptions())] * choices)


def test_a_reader_who_has_fallen_behind_gets_everything_at_once() -> None:
    job = job_of(2)
    for i, letter in enumerate("abc"):
        job.add(Update(0, letter, (Token(i, i),)))
    job.add(Update(1))
    job.add(Update(0, end=End("stop", 3)))
    updates = asyncio.run(job.news())
    assert updates == [Update(0, "abc", (Token(0, 0), Token(1, 1), Token(2, 2)), End("stop", 3)), Update(1)]


def test_news_are_empty_once_all_is_taken() -> None:
    job = job_of(1)
    job.add(Update(0, "a", end=End("stop", 1)))
    job.running = 0
    assert len(asyncio.run(job.news())) == 1
    assert asyncio.run(job.news()) == []


def test_the_first_error_follows_what_was_written_before_it_and_nothing_follows_the_error() -> None:
    job = job_of(1)
    job.add(Update(0, "a"))
    job.fail(ApiError(500, "first"))
    job.fail(ApiError(500, "second"))
    job.add(Update(0, "b"))
    assert asyncio.run(job.news()) == [Update(0, "a")]
    with pytest.raises(ApiError, match="first"):
        asyncio.run(job.news())


def test_a_histogram_counts_up_to_and_including_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.5):
        histogram.add(value)
    histogram.add(2.0, 3)
    buckets = {'_bucket{le="1.0"}': 2, '_bucket{le="2.0"}': 6, '_bucket{le="+Inf"}': 7}
    assert histogram.samples() == {**buckets, "_sum": 11.5, "_count": 7}


def test_tokens_are_counted_by_how_they_came() -> None:
    metrics = Metrics()
    metrics.count_tokens(2, 0.3, first=True)
    metrics.count_tokens(4, 0.2, first=False)
    assert metrics.generated_tokens == 6
    assert (metrics.first_token.sum, sum(metrics.first_token.counts)) == (0.3, 1)
    assert (metrics.per_token.sum, sum(metrics.per_token.counts)) == (pytest.approx(0.2), 4)
