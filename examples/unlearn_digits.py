"""Make the shipped digits network forget the 0 from Python, and look at the result.

python examples/unlearn_digits.py [FOLDER] [ITERATIONS]
"""

import sys

import pecker_fast as pf


def main(folder: str = "runs/example-forget-0", iterations: int = 120) -> None:
    run = pf.unlearn(
        "digits",
        method="pecker+",
        forget=[0],
        cover=1,
        output_dir=folder,
        overwrite_output_dir=True,
        max_train_steps=iterations,
        progress_bar=False,
    )
    for key in ("ua", "retain_accuracy", "frechet_distance"):
        print(f"{key}: {run.metrics[key]:.3g}")
    # A diffusers pipeline that draws in one step: requested as 0, drawn as 1.
    images = run.pipeline(class_labels=[0, 1, 2]).images
    print(f"{len(images)} images; report: {run.report}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
