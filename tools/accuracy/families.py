"""`python -m tools.accuracy.family_table`: float32 error of each family's tiny model against torch.

The greatest |error| of any sub-layer's output, of the logits, and of the log-probs of a sequence's tokens.
"""

import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.model.test_parity import CASES, WAYS, make_case, names_of, run


def main() -> None:
    """Prints a row for each case."""
    table = Table("case", "sub-layers", "logits", "log-probs")
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(name, Path(folder))
        golden, at = case.golden, case.golden["positions"]
        errors = {part: np.abs(case.traced[part][at] - golden[part]).max() for part in names_of(name)}
        _, logits = run(case.model, golden["tokens"], WAYS["one_chunk"])
        own = np.take_along_axis(logits[:-1], golden["tokens"][1:, None], 1)[:, 0]
        logprobs = own - np.logaddexp.reduce(logits[:-1].astype(np.float64), axis=1)
        worst = np.abs(logprobs - golden["token_logprobs"]).max()
        of_layers = max(error for part, error in errors.items() if part != "logits")
        table.add_row(name, f"{of_layers:.1e}", f"{errors['logits']:.1e}", f"{worst:.1e}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
