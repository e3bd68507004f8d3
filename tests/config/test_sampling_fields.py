"""A sampling field is declared once and passed on by its name; CONTRIBUTING.md lists the files of a new one."""

import dataclasses

import pytest

from compiled.state import SamplingArrays
from serve.config.generation_config import SamplingFieldKeywords, SamplingFields
from serve.engine import batch
from serve.engine.request import SamplingParams
from serve.jobs.generate import sampling_params


def test_sampling_fields_have_the_same_names_in_every_layer() -> None:
    names = SamplingFields.model_fields.keys()
    assert SamplingFieldKeywords.__annotations__.keys() == names
    assert names <= {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_p", 0.5),
        ("top_k", 5),
        ("min_p", 0.5),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("repetition_penalty", 0.5),
    ],
)
def test_sampling_params_has_every_field(name: str, value: float) -> None:
    params = sampling_params(SamplingFields.model_validate({name: value}))
    assert params == dataclasses.replace(SamplingParams(max_tokens=0), **{name: value})  # type: ignore[arg-type]
    assert getattr(params, name) == value


def test_sampling_arrays_copies_fields_of_the_same_name() -> None:
    shared = {field.name for field in dataclasses.fields(SamplingArrays)}
    shared &= {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(batch._COPIED) == shared - {"seed"} >= {"temperature", "top_k", "top_p", "min_p", "processed"}
