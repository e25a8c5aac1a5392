"""Train wide networks on the digits, by the shipped weights, by files of weights, and by Adam; one line a training.

python evidence/learned_optimizer/wide.py 512 --steps 300 --weights lm-small metz19
python evidence/learned_optimizer/wide.py 1024 --steps 150 --seeds 1 --weights lm-small metz19
"""

from __future__ import annotations

import argparse

import run as evidence
import torch

from lightning_methods import LearnedOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("width", type=int, help="units of both hidden layers")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--weights", nargs="*", default=["lm-small", "metz19"], help="names or files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = evidence.digits()
    task = evidence.Task(lambda root: data, evidence.mlp(64, args.width, args.width, 10), (args.steps,))
    for seed in range(args.seeds):
        for name in args.weights:
            found = evidence.train(task, data, lambda p, w=name: LearnedOptimizer(p, weights=w), args.steps, seed)
            print(seed, name, found, flush=True)
        found = evidence.train(task, data, lambda p: torch.optim.Adam(p, lr=1e-3), args.steps, seed)
        print(seed, "Adam, 0.001", found, flush=True)


if __name__ == "__main__":
    main()
