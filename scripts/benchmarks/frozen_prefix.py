"""What it saves that nothing below the lowest adapted block is differentiated: time and peak memory of a step.

    python scripts/benchmarks/frozen_prefix.py --batch 8 --length 256

Both variants train the same deltas on the top half of the blocks and give the same gradients; in "differentiated" the
output of the embeddings requires gradients, as transformers' own `enable_input_require_grads` makes it.
"""

from __future__ import annotations

import copy
import statistics

from common import load_model, make_parser, median_ratio, peak_bytes, random_batch, report, time_in_turn
from training_step import make_adaptq, make_step


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    base = load_model(arguments)
    batch = random_batch(base, arguments.batch, arguments.length)
    models = {name: make_adaptq(copy.deepcopy(base), "nf4") for name in ("frozen prefix", "differentiated")}
    embeddings = models["differentiated"].get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    steps = {name: make_step(model, batch) for name, model in models.items()}
    seconds = time_in_turn(steps, arguments.repeats)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    report(
        arguments,
        {
            "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "time_ratio": median_ratio(seconds, "frozen prefix", "differentiated"),
            "step_bytes": peaks,
            "memory_ratio": peaks["frozen prefix"] / peaks["differentiated"],
        },
    )


if __name__ == "__main__":
    main()
