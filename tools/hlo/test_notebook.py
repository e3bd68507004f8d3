"""The notebook runs completely, and its stored outputs contain what its text describes."""

from typing import Any

import nbformat
import pytest

from tools.hlo.executed_notebook import NOTEBOOK
from tools.portability.test_portability import needs_compilers

PROGRAMS = ("decode_1", "decode_4", "prefill_64", "score_64", "penalties", "copy_pages")


@pytest.fixture(scope="module")
def executed(executed_notebook: str) -> Any:
    """The executed notebook."""
    return nbformat.reads(executed_notebook, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def images(notebook: Any) -> list[str]:
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def check_outputs(notebook: Any) -> None:
    """Check the outputs that the text refers to."""
    text = printed(notebook)
    rows = [line.split()[0] for line in text.splitlines() if line.endswith(" Gflop")]
    assert rows == list(PROGRAMS)
    for direction in ("GT", "EQ", "LT"):  # in each of the 16 parts of the vocabulary
        assert any("= pred[1,3072] compare(" in line for line in text.splitlines() if line.endswith(direction))
    assert "copies of an array like bf16[33,3,64,64]: 0" in text
    assert "copies of an array of the slots: 0" in text
    assert "prefill_64 no logits at all" in text
    assert "score_64   ['f32[64]', 's32[64]', 's32[64,20]', 'f32[64,20]', 'f32[64,128]', 's32[64,128]']" in text
    check_other_chips(text)
    assert len(images(notebook)) == 3


def check_other_chips(text: str) -> None:
    """Check one decode step on three platforms."""
    lines = text.splitlines()
    assert "decode_1, each device            cpu        h100     v5e:2x2" in lines
    (between,) = [line.split()[1:] for line in lines if line.startswith("collectives")]
    assert between[:2] == ["0", "0"]
    assert int(between[2]) > 60  # after attention and MLP of 30 layers, and for log-probs
    assert "h100     kernels: __gpu$xla.gpu.triton" in lines
    assert "v5e:2x2  kernels: tpu_custom_call" in lines
    for chip, width in (("h100", 3072), ("v5e:2x2", 768)):  # a sixteenth of the vocabulary, or of its quarter
        after = lines[lines.index(f"{chip}: 192 comparisons") + 1 :][:3]
        for line, direction in zip(after, ("GT", "EQ", "LT"), strict=True):
            assert f"direction={direction}" in line
            assert f"{width}] compare(" in line
    for chip in ("cpu", "h100", "v5e:2x2"):
        assert any(line.startswith(f"{chip:8} 30 layers of") for line in lines)


@needs_compilers
def test_notebook_runs(executed: Any) -> None:
    assert [output for output in outputs(executed) if output.output_type == "error"] == []
    assert [output.text for output in outputs(executed) if output.get("name") == "stderr"] == []
    check_outputs(executed)


def test_stored_outputs_are_complete() -> None:
    check_outputs(nbformat.read(NOTEBOOK, as_version=4))


def test_stored_file_is_small_and_names_no_local_file() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert sum(len(image) for image in images(notebook)) < 300_000
    text = printed(notebook)
    assert ".py" not in text
    assert "site-packages" not in text
