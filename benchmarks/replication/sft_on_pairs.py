"""Fine-tune on the examples that make pairs in another run, such as those with a wrong greedy response.

    python benchmarks/replication/sft_on_pairs.py RECIPE [FIELD=VALUE …] --run-dir DIR --start-from RUN

This control has the same start, examples and number of steps as self-play in RUN, and the objective `sft`.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

from spinlm import load_recipe, selfplay
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, read_lines, read_pairs, to_line
from spinlm.stages import train
from spinlm.training.batches import SftDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, required=True)
    args = parser.parse_args()
    source = RunDir(args.start_from)
    pairs = sorted(source.pairs(0, "train", 0).parent.glob("train-*.arrow"))
    chosen = {row["id"] for row in read_pairs(pairs).to_pylist() if row["contrast"]}

    def dataset(path: Path, batch_cost: int = 1) -> SftDataset:
        """Return the data set of the chosen examples of a file."""
        target = args.run_dir / "examples_with_pairs.jsonl"
        target.write_text("".join(to_line(row) for row in read_lines(path, Example) if row.id in chosen), "utf-8")
        return SftDataset(target, batch_cost)

    with patch.object(train, "SftDataset", dataset):
        selfplay.run(load_recipe(args.recipe, args.settings), args.run_dir, start_from=args.start_from)


if __name__ == "__main__":
    main()
