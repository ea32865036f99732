"""Bodies made from the server's own description of itself, right and wrong ones: none may make it fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import BaseSchema, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from served import ScriptedDecoder, serving

EXAMPLES = 120
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@pytest.fixture(scope="module")
def api() -> Iterator[BaseSchema]:
    with serving(decoders=[ScriptedDecoder(b"ok", max_length=64)], chat=True) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/inspect"])
def test_no_body_makes_the_server_fail(api: BaseSchema, path: str, mode: GenerationMode) -> None:
    seen = set()

    @given(case=api[path]["POST"].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def check(case: Case) -> None:
        seen.add(case.call_and_validate(checks=CHECKS).status_code)

    check()
    assert (200 in seen) == (mode == GenerationMode.POSITIVE)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/health", "/metrics"])
def test_no_name_makes_the_server_fail(api: BaseSchema, path: str) -> None:
    @given(case=api[path]["GET"].as_strategy())
    @settings(max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(case: Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()
