"""Training by PyTorch Lightning (extra ``train``), shared by fine-tuning and dense training.

For training loops of one's own: `pooling`, heads for labels of whole images, which need no extra.

- `settings`: epochs, learning rate, precision and the like,
- `loop`: `fit`, which runs Lightning,
- `checkpoints`: a run's files, written atomically and read by the same run only,
- `callbacks`: checkpoints, history, losses that are not finite, a progress bar,
- `normalization`: a trial of batch norm on the smallest batch, before training,
- `sampling`: batches and augmentation that depend on seed, epoch and index only.
"""

from fcvgg.training.pooling import AttentionPool, LogSumExpPool, MeanPool, TopSharePool
from fcvgg.training.settings import Settings

__all__ = ["AttentionPool", "LogSumExpPool", "MeanPool", "Settings", "TopSharePool"]
