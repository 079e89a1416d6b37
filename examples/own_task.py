"""A task of one's own: topics of texts, trained with the focal loss, measured by top-3 accuracy too.

    mpifedlora run examples/own_task.toml --out runs/own-task

docs/tasks.md explains the functions. Reference of the loss: Lin et al. 2017, arXiv 1708.02002, equation 5.
"""

import torch
from torch.nn.functional import cross_entropy

from mpifedlora.core.metrics import classification_metrics
from mpifedlora.training.task import TextTask


class FocalTopics(TextTask):
    """`encode` and `collate` are TextTask's: the column `text` as padded token ids, and the labels."""

    statistics = ("loss", "predicted", "is_in_top_3")
    metric_names = ("top3_accuracy",)
    gamma = 2.0

    def loss(self, outputs, targets):
        """Mean of (1 - p)^gamma * -log p, p the probability of the right label."""
        losses = cross_entropy(outputs.float(), targets, reduction="none")
        return ((1 - (-losses).exp()) ** self.gamma * losses).mean()

    def measure(self, model, inputs, targets):
        """What is to be known of each example, one row each."""
        logits = model(inputs).float()
        losses = cross_entropy(logits, targets, reduction="none")
        is_in_top = (logits.topk(3).indices == targets[:, None]).any(dim=1)
        return torch.stack([losses, logits.argmax(dim=1), is_in_top], dim=1).cpu()

    def metrics(self, statistics, examples):
        """From the rows of all examples to what the results show."""
        losses, predicted, is_in_top = statistics.T
        found = classification_metrics(losses, predicted.astype(int), examples.labels)
        return found._replace(others={"top3_accuracy": float(is_in_top.mean())})


def build(setup):
    """Return the base model with its head, and the task."""
    task = FocalTopics(setup.tokenizer(), setup.max_length, setup.device, setup.cache)
    task.gamma = setup.options.get("gamma", 2.0)
    return setup.classifier(), task
