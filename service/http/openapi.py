"""Complete BentoML's OpenAPI document, so that it is true about every request and answer.

BentoML knows neither the contract of the serving version, which may change with a promotion, nor the answers of
the middleware in front of it.
"""

from __future__ import annotations

from typing import Any

from pipeline.core.contract.requests import request_document
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import ConfigError
from pipeline.core.policy import STATUSES
from pipeline.core.settings import conf_folder
from service.answering.core import Core

Document = dict[str, Any]

_ERRORS = {
    400: "The body breaks the data contract; `detail` names each place and rule.",
    401: "A valid API key is required, or the service answers its own machine only.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON in UTF-8.",
    421: "The Host header names another host.",
    503: "Nothing is promoted yet, or too many requests are in progress: see `Retry-After`.",
}
_REASONS: Document = {
    "type": "array",
    "maxItems": 4,
    "items": {
        "type": "object",
        "required": ["field", "reason"],
        "properties": {"field": {"type": "string"}, "reason": {"type": "string"}},
    },
    "description": "What pushed towards default, strongest first.",
}
_NUMBER = {"type": "number"}
_TAG = {"type": "string", "example": "credit_risk_model:v3"}


def openapi(document: Document, core: Core, *, with_keys: bool) -> Document:
    """Complete BentoML's document for the serving version."""
    schema = _contract(core)
    components = document["components"]
    components["schemas"] = {
        "Application": _application(schema),
        "Decision": _decision(core),
        "Explanation": _explanation(core, schema),
        "Error": _error(),
    }
    paths = document["paths"]
    example = schema.example() if schema else None
    rows = {"type": "array", "items": _ref("Application"), "maxItems": core.settings.limits.batch_rows}
    answers = {"type": "array", "items": _ref("Decision")}
    _describe(paths["/classify"]["post"], _ref("Application"), example, _ref("Decision"))
    _describe(paths["/classify_batch"]["post"], rows, [example, example] if example else None, answers)
    _describe(paths["/explain"]["post"], _ref("Application"), example, _ref("Explanation"))
    paths["/model"] = {"get": _model_operation()}
    paths["/metrics"]["get"]["responses"]["401"] = _response(_ERRORS[401])
    paths["/readyz"]["get"]["responses"]["503"] = {"description": "Nothing is promoted yet."}
    if with_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["security"] = [{"bearer": []}, {"key": []}]
    return document


def _contract(core: Core) -> Schema | None:
    """Give the contract of the serving version; if there is none, the configured one."""
    version = core.version()
    if version is not None:
        return version.model.schema
    try:
        return Schema.load(conf_folder() / "schema.yaml")
    except ConfigError:
        return None


def _application(schema: Schema | None) -> Document:
    if schema is None:
        return {"type": "object"}
    return {**request_document(schema), "example": schema.example()}


def _decision(core: Core) -> Document:
    properties: Document = {
        "Status": {"type": "string", "enum": list(STATUSES)},
        "probability": {**_NUMBER, "minimum": 0, "maximum": 1, "description": "Probability of default."},
        "model": {**_TAG, "description": "The version that decided."},
        "request_id": {"type": "string", "description": "X-Request-ID of the request, or a new one."},
    }
    if core.settings.reasons:
        properties["reasons"] = _REASONS
    return {"type": "object", "required": list(properties), "properties": properties}


def _explanation(core: Core, schema: Schema | None) -> Document:
    decision = _decision(core)["properties"]
    properties: Document = {
        **decision,
        "log_odds": {**_NUMBER, "description": "Of default: the bias and all contributions together."},
        "bias": {**_NUMBER, "description": "Log-odds before anything is known of the applicant."},
        "contributions": {
            "type": "object",
            "description": "What each field adds to the log-odds; positive: towards default.",
            "properties": dict.fromkeys(schema.features, _NUMBER) if schema else {},
        },
        "reasons": _REASONS,
    }
    return {"type": "object", "required": list(properties), "properties": properties}


def _error() -> Document:
    detail = {
        "type": "object",
        "required": ["loc", "msg", "type"],
        "properties": {
            "loc": {
                "type": "array",
                "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                "description": "Path to the place: row of a batch, field.",
            },
            "msg": {"type": "string"},
            "type": {"type": "string"},
        },
    }
    return {
        "type": "object",
        "required": ["error", "detail"],
        "properties": {"error": {"type": "string"}, "detail": {"type": "array", "items": detail}},
    }


def _describe(operation: Document, body: Document, example: Any, answer: Document) -> None:
    content: Document = {"schema": body} if example is None else {"schema": body, "example": example}
    operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    operation["responses"] = {
        "200": _response("Decided.", answer),
        **{str(status): _response(text) for status, text in _ERRORS.items()},
    }


def _model_operation() -> Document:
    promotion = {"type": "object", "nullable": True, "properties": {"tag": _TAG}}
    answer = {"type": "object", "properties": {"promoted": promotion, "loaded": promotion}}
    return {
        "operationId": "credit_risk_classifier__model",
        "description": "What is promoted, what answers, and which promoted version was refused last.",
        "tags": ["Service APIs"],
        "responses": {"200": _response("Known.", answer), "401": _response(_ERRORS[401])},
    }


def _response(description: str, schema: Document | None = None) -> Document:
    return {
        "description": description,
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": schema or _ref("Error")}},
    }


def _ref(name: str) -> Document:
    return {"$ref": f"#/components/schemas/{name}"}
