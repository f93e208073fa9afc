"""The pocket world: texts and tasks to train the small models that stand in for pretrained ones."""
