"""The public library of runs: what the command line calls.

From Python, ``pecker_fast.unlearn``, ``evaluate``, ``compare`` and ``Run`` are the short way (``api``, ``run``). The
modules below them take options as dataclasses: ``unlearn.unlearn(UnlearnArguments)`` and likewise ``evaluate``,
``compare``, ``pretrain``, ``fisher``, ``sequence`` and ``robustness``; ``demo``, ``sample``, ``masks``, ``convert``,
``patches``, ``train_classifier`` and ``reports`` are plain functions.
"""
