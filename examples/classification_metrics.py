"""Scores of classifiers, in per cent where they are shares, from arrays of NumPy."""

import numpy as np


def confusion_matrix(answers: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many texts of each class (rows) were given each class (columns)."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (labels, answers), 1)
    return matrix


def score_classes(
    answers: np.ndarray, labels: np.ndarray, special: int | None = None, name: str = "special"
) -> dict[str, float]:
    """
    Accuracy, and the mean of the F1 of all classes that occur. With a `special` class, which goes by a `name`, its
    recall, and the accuracy on the texts of all others.
    """
    right = answers == labels
    matrix = confusion_matrix(answers, labels, int(max(answers.max(), labels.max())) + 1)
    occurrences = matrix.sum(0) + matrix.sum(1)
    f1 = 2 * np.diag(matrix)[occurrences > 0] / occurrences[occurrences > 0]
    scores = {"accuracy": 100 * right.mean(), "macro_f1": 100 * f1.mean()}
    if special is not None:
        is_special = labels == special
        scores[f"recall_of_{name}"] = 100 * right[is_special].mean() if is_special.any() else 0.0
        scores[f"accuracy_without_{name}"] = 100 * right[~is_special].mean() if (~is_special).any() else 0.0
    return {key: float(value) for key, value in scores.items()}


def score_labels(answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Of arrays `(texts, labels)` of booleans: F1 of all decisions, the mean of the F1 of the labels that occur, and the
    share of texts with exactly the right labels.
    """
    both, either = (answers & labels).sum(0), answers.sum(0) + labels.sum(0)
    f1 = 2 * both[either > 0] / either[either > 0]
    return {
        "micro_f1": float(200 * both.sum() / max(1, either.sum())),
        "macro_f1": float(100 * f1.mean()) if len(f1) else 0.0,
        "exact_match": float(100 * (answers == labels).all(-1).mean()),
    }


def score_numbers(answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean absolute and squared error, and the correlations of Pearson and Spearman (0 where one side is constant)."""
    answers, labels = answers.astype(np.float64), labels.astype(np.float64)
    return {
        "mean_absolute_error": float(np.abs(answers - labels).mean()),
        "mean_squared_error": float(np.square(answers - labels).mean()),
        "pearson": _correlation(answers, labels),
        "spearman": _correlation(_ranks(answers), _ranks(labels)),
    }


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(), right - right.mean()
    norm = np.sqrt((left**2).sum() * (right**2).sum())
    return float((left * right).sum() / norm) if norm > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, of equal values their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
