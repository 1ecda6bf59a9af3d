"""Fine-tuning: a trained classifier for other classes, trained, converted and reported on.

- `images`: images resized and augmented as a network's input,
- `strategies`: what is trained, and which strategy suits how many images of what kind,
- `classification`: the Lightning module; `svm`: features and a support vector machine; `outputs`:
  what a classifier gives images,
- `finetuning`: `finetune`, from folder to bundle; `pretrained`: what it starts from; `job`: the
  training of each strategy; `result`: `FineTuned`,
- `report`: curves, confusion matrix, and heatmaps of the worst mistakes.
"""
