"""The pocket world: the texts and tasks from which the small models learn that stand in for pretrained ones."""
