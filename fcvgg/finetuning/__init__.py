"""Fine-tuning: a trained classifier for other classes, trained, converted and reported on.

- `images`: the folders' images, resized and augmented,
- `strategies`: what is trained, and which way suits how many images of what kind,
- `tasks`: what Lightning runs; `svm`: features and a support vector machine,
- `finetuning`: `finetune`, from folder to bundle; `pretrained`: what it starts from; `fitting`: the
  training of each strategy; `result`: `FineTuned`,
- `report`: curves, confusion matrix, and heatmaps of the worst mistakes.
"""
