"""The text of a certificate: JSON of a versioned schema, checked when read.

A later version may add fields; each gets a default here, so that older files stay readable. A field
that this version does not know is refused, because it may change what the certificate promises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from confprune.certificate.evidence import Looks, Part, Pruning, ScoreData

SCHEMA = "confprune-certificate/1"


def to_text(fields: dict[str, Any], outcome: dict[str, Any]) -> str:
    """A certificate's fields and, for readers of the text alone, its outcome.

    Parameters
    ----------
    fields : dict
        The fields of the dataclass; NaN becomes null.
    outcome : dict
        ``certified``, ``level`` and ``sparsity``, which follow from the fields.
    """
    content = _nan_to_null({"schema": SCHEMA, **outcome, **fields})
    # Python writes the shortest decimals that read back as the same float.
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_text(text: str | bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `to_text` wrote, each field checked for its type.

    Returns
    -------
    (fields, outcome)
        The arguments of the certificate, and what was given to `to_text`.

    Raises
    ------
    ValueError
        If the content is not JSON of this schema.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"it is not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise ValueError("its JSON is not an object")
    schema = content.pop("schema", None)
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, this version reads {SCHEMA!r}")
    fields = _parse_object(content, {**_OUTCOME, **_FIELDS})
    return fields, {name: fields.pop(name) for name in _OUTCOME}


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nan_to_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _refuse_constant(token: str) -> float:
    raise ValueError(f"{token} is no JSON number")


def _parse_object(value: Any, fields: dict[str, Callable[[Any], Any]], path: str = "") -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path.rstrip('.')} is {_kind(value)}, not an object")
    for name in fields:
        if name not in value:
            raise ValueError(f"the field {path}{name} is missing")
    for name in value:
        if name not in fields:
            raise ValueError(f"the field {path}{name} is unknown: a newer version may have made it")
    parsed = {}
    for name, parse in fields.items():
        try:
            parsed[name] = parse(value[name])
        except TypeError as problem:
            raise ValueError(f"the field {path}{name} {problem}") from problem
    return parsed


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _expect(value: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
    # A bool is an int to isinstance, but not in a certificate.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"is {_kind(value)}, not {wanted}")
    return value


def _text(value: Any) -> Any:
    return _expect(value, str, "text")


def _integer(value: Any) -> Any:
    return _expect(value, int, "a whole number")


def _number(value: Any) -> float:
    number = _expect(value, (int, float), "a number")
    try:
        return float(number)
    except OverflowError:
        raise TypeError("is too large a number") from None


def _truth(value: Any) -> Any:
    return _expect(value, bool, "a truth value")


def _or_null(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _list_of(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: tuple(parse(item) for item in _expect(value, list, "a list"))


def _map_of(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parse_map(value: Any) -> Any:
        return {name: parse(item) for name, item in _expect(value, dict, "an object").items()}

    return parse_map


def _values(value: Any) -> Any:
    return _list_of(lambda item: math.nan if item is None else _number(item))(value)


def _shape(value: Any) -> Any:
    return list(_list_of(_integer)(value))


def _fingerprint_entry(value: Any) -> Any:
    fields: dict[str, Callable[[Any], Any]] = {"shape": _shape, "dtype": _text, "sha256": _text}
    return _parse_object(value, fields, "pruning.fingerprint.")


def _pruning(value: Any) -> Any:
    fields = {
        "scope": _text,
        "criterion": _text,
        "parameters": _list_of(_text),
        "fingerprint": _map_of(_fingerprint_entry),
        "total": _integer,
        "network": _or_null(_integer),
        "pattern": _or_null(_text),
        "inputs_first": _map_of(_integer),
        "statistics": _map_of(_map_of(_fingerprint_entry)),
        "score_data": _or_null(_score_data),
    }
    later: dict[str, Any] = {
        "network": None,
        "pattern": None,
        "inputs_first": {},
        "statistics": {},
        "score_data": None,
    }
    value = {**later, **value} if isinstance(value, dict) else value
    return Pruning(**_parse_object(value, fields, "pruning."))


def _score_data(value: Any) -> Any:
    fields = {"source": _text, "examples": _or_null(_integer)}
    return ScoreData(**_parse_object(value, fields, "pruning.score_data."))


def _part(value: Any) -> Any:
    fields = {
        "loss": _text,
        "pvalue": _text,
        "alpha": _number,
        "group": _or_null(_text),
        "counts": _list_of(_integer),
        "risks": _values,
        "pvalues": _values,
        "bounds": _values,
    }
    return Part(**_parse_object(value, fields, "parts."))


def _looks(value: Any) -> Any:
    fields = {
        "sizes": _list_of(_integer),
        "spending": _list_of(_number),
        "seen": _list_of(_integer),
        "evaluations": _integer,
        "saved": _number,
        "order": _text,
    }
    return Looks(**_parse_object(value, fields, "looks."))


_OUTCOME: dict[str, Callable[[Any], Any]] = {
    "certified": _truth,
    "level": _or_null(_integer),
    "sparsity": _number,
}

_FIELDS: dict[str, Callable[[Any], Any]] = {
    "sparsities": _list_of(_number),
    "alpha": _number,
    "delta": _or_null(_number),
    "n": _integer,
    "loss": _text,
    "pvalue": _text,
    "procedure": _text,
    "risks": _values,
    "pvalues": _values,
    "bounds": _values,
    "rejected": _list_of(_truth),
    "pruning": _or_null(_pruning),
    "seed": _or_null(_integer),
    "notes": _list_of(_text),
    "versions": _map_of(_text),
    "guarantee": _text,
    "parts": _list_of(_part),
    "looks": _or_null(_looks),
    "accept": _or_null(_text),
    "acceptance": _or_null(_values),
}
