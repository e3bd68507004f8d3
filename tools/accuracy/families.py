"""`python -m tools.accuracy.families`: float32 error of each family's tiny model against torch.

Maximum |error| of the outputs of sub-layers, of the logits, and of the log-probs of a sequence.
"""

import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.model.test_parity import CASES, WAYS, make_case, names_of, run


def main() -> None:
    """Print a row for each case."""
    table = Table("case", "sub-layers", "logits", "log-probs")
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(name, Path(folder))
        golden, positions = case.golden, case.golden["positions"]
        errors = {part: np.abs(case.traced[part][positions] - golden[part]).max() for part in names_of(name)}
        _, logits, _ = run(case, WAYS["one_chunk"])
        chosen = np.take_along_axis(logits[:-1], golden["tokens"][1:, None], 1)[:, 0]
        logprobs = chosen - np.logaddexp.reduce(logits[:-1].astype(np.float64), axis=1)
        worst = np.abs(logprobs - golden["token_logprobs"]).max()
        layer_error = max(error for part, error in errors.items() if part != "logits")
        table.add_row(name, f"{layer_error:.1e}", f"{errors['logits']:.1e}", f"{worst:.1e}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
