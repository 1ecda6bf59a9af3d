"""Score maps side by side: fcvgg, the usual recipe, timm, ONNX Runtime, OpenVINO, sliding windows.

    pip install 'fcvgg[bench]'
    python examples/benchmarks/speed.py --output results

Every contender runs in a process of its own; ``fcvgg bench`` times one model's networks in one
process. Writes ``speed.md``, ``speed.json`` and ``speed.png``. On a busy machine ``--clock cpu
--threads 1`` counts the processor's time, which neighbours hardly disturb.
The whole table takes long; ``--sizes``, ``--batches``, ``--only`` and ``--add`` make it in pieces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fcvgg.optimization.timing import CLOCKS
from measurements import benchmark
from results import Benchmark


def main() -> None:
    """Measure and write the table."""
    arguments = parse_arguments()
    table = arguments.output / "speed.json"
    before = Benchmark.read(table) if arguments.add and table.exists() else None

    def joined(result: Benchmark) -> Benchmark:
        return result if before is None else before.joined(result)

    def keep(result: Benchmark) -> None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        joined(result).write(arguments.output)

    result = benchmark(
        arguments.model,
        sizes=arguments.sizes,
        batches=arguments.batches,
        repeats=arguments.repeats,
        contenders=arguments.only,
        threads=arguments.threads,
        clock=arguments.clock,
        report=print,
        keep=keep,
    )
    print(joined(result).markdown())
    for path in joined(result).write(arguments.output):
        print(f"wrote {path}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vgg16", help="a torchvision name")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders, as in the table")
    parser.add_argument(
        "--add", action="store_true", help="to the speed.json of earlier runs in the output folder"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
