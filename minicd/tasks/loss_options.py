"""The settings of the loss and its labels, which all experiments share."""

from __future__ import annotations

from dataclasses import dataclass

from ..distill import PracticeSettings, check_labels
from .experiment import option
from ..losses import LOSSES, label_kind, loss_named


@dataclass
class LossOptions:
    """What the student is trained with. The paper: the loss empirical, on 100 samples for each label (section 2.4)."""

    loss: str = option("empirical", "the student's loss, by its name in losses.py; the paper's is empirical", choices=LOSSES)
    jsd_beta: float = option(0.5, "of the loss jsd: the weight β of the teacher, between 0 (forward KL) and 1 (reverse KL)")
    labels: str = option("auto", "what is kept of the teacher's distributions: sampled, top, exact, or auto: what the loss needs",
                         choices=("auto", "sampled", "top", "exact"))
    label_samples: int = option(100, "samples in a sampled label")
    label_top: int = option(16, "most likely tokens in a top label")
    on_policy: bool = option(False, "the student writes the answers and the teacher labels them; needs the identity as extractor")

    def __post_init__(self) -> None:
        loss_named(self.loss, self.jsd_beta)
        check_labels(self.loss, self.label_kind == "sampled")

    @property
    def label_kind(self) -> str:
        return label_kind(self.loss) if self.labels == "auto" else self.labels

    def practice_settings(self, max_new_tokens: int) -> PracticeSettings:
        return PracticeSettings(self.label_kind, self.label_samples, self.label_top, max_new_tokens=max_new_tokens, precision="auto")
