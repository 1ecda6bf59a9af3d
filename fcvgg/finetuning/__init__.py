"""Fine-tuning: a trained classifier for other classes, trained, converted and reported on.

- `finetuning`: `finetune`, from folder to bundle; `result`: `FineTuned`; `report`: learning curves,
  confusion matrix, and heatmaps of the worst mistakes,
- `pretrained`: the classifier to start from; `strategies`: what is trained, and which strategy
  suits how many images of what kind,
- `job`: the training of each strategy; `classification`: the Lightning module; `svm`: a support
  vector machine on features; `outputs`: a classifier's outputs and features,
- `images`: images resized and augmented as a network's input.
"""
