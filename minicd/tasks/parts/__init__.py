"""What the experiments are built from: data, prompts, scores, tables. None of them knows an experiment."""
