"""schemathesis: requests made from /openapi.json, fitting and not, never fail the server.

Not for what an answer says. The document is the server's own; the requests are the same in every run.
"""

import hypothesis
import pytest
import schemathesis
from conftest import PROMPT, Server
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

SMALL = {"max_tokens": 8, "max_completion_tokens": 8, "min_tokens": 8, "n": 2, "best_of": 2}


@pytest.fixture(scope="module")
def served():
    server = Server()
    yield server
    # It still writes, and counted no failure of its own.
    with server.client() as client:
        assert client.completions.create(model="demo", prompt=PROMPT, max_tokens=4).choices[0].text
    server.stop()


@pytest.fixture
def document(served):
    return schemathesis.openapi.from_url(f"{served.root}/openapi.json")


def small(body):
    """The same wish for little text: what is tried is the form, and long texts are tried elsewhere."""
    if not isinstance(body, dict) or not {"prompt", "messages"} & set(body):
        return body
    wished = {key: most for key, most in SMALL.items() if type(body.get(key)) is int and body[key] > most}
    return {"max_tokens": 8, **body, **wished}


def attempt(operation, mode):
    """Forty requests to one operation: fitting the document, or broken in places."""

    @hypothesis.settings(max_examples=40, derandomize=True, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def try_one(case):
        case.body = small(case.body)
        response = case.call(timeout=30)
        statuses.append(response.status_code)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=[content_type_conformance, response_schema_conformance])

    statuses = []
    try_one()
    return statuses


def test_no_request_fails_the_server(document):
    answered = {}
    for found in document.get_all_operations():
        operation = found.ok()
        statuses = attempt(operation, schemathesis.GenerationMode.POSITIVE)
        if operation.body:
            statuses += attempt(operation, schemathesis.GenerationMode.NEGATIVE)
        answered[operation.label] = set(statuses)
    assert answered["GET /v1/models"] == {200} and answered["GET /"] == {200}
    # Requests that fit are served, and broken ones refused.
    assert {200, 400} <= answered["POST /v1/completions"], answered
