"""Training by PyTorch Lightning (extra ``train``), shared by fine-tuning and dense training.

- `settings`: how long, how fast, with what precision,
- `loop`: `fit`, the one path through Lightning,
- `checkpoints`: a run's files, written whole and read by the same run only,
- `callbacks`: which checkpoints are kept, history, losses that are not finite,
- `normalization`: whether batch norm can train on batches of a size, tried before training,
- `sampling`: batches and augmentation that depend on seed, epoch and index only.
"""

from fcvgg.training.settings import Settings

__all__ = ["Settings"]
