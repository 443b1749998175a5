"""Phase 1 as the paper words it: one `predict` a point, full-resolution masks, plain loops.

Slow on purpose; the fast path of `helpers.anchors` is compared with it.
"""

import numpy as np
from segment_anything import SamPredictor


def literal_proposals(sam, image, points):
    """One `SamPredictor.predict` for each point; the mask with the highest predicted IoU."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    return literal_answers(predictor, points)


def literal_answers(predictor, points):
    """Those of the image that is set."""
    masks, scores = [], []
    for x, y in points.reshape(-1, 2):
        three, quality, _ = predictor.predict(np.array([[x, y]]), np.array([1]))
        best = int(np.argmax(quality))
        masks.append(three[best])
        scores.append(float(np.clip(quality[best], 0, 1)))
    return np.array(masks), np.array(scores)


def literal_identity(mask):
    """v = (X, Y, sqrt(CNT)), pixel by pixel."""
    y, x = np.nonzero(mask)
    if len(x) == 0:
        return None
    return np.array([x.mean(), y.mean(), np.sqrt(len(x))])


def literal_iou(a, b):
    """IoU of two masks."""
    either = (a | b).sum()
    return (a & b).sum() / either if either else 0.0


def literal_clusters(vectors, threshold):
    """Average linkage by definition: merge the two closest clusters until they are too far."""
    clusters = [[i] for i in range(len(vectors))]
    while len(clusters) > 1:
        pairs = [
            (
                np.mean(
                    [
                        np.linalg.norm(vectors[i] - vectors[j])
                        for i in clusters[a]
                        for j in clusters[b]
                    ]
                ),
                a,
                b,
            )
            for a in range(len(clusters))
            for b in range(a)
        ]
        distance, a, b = min(pairs)
        if distance > threshold:
            break
        clusters[b] += clusters[a]
        del clusters[a]
    return clusters


def literal_anchor(masks, scores, threshold, iou_duplicate=0.9):
    """Index of the anchor among the K masks of one superpixel, None where all are empty."""
    vectors = [literal_identity(mask) for mask in masks]
    rows = [i for i, v in enumerate(vectors) if v is not None]
    if not rows:
        return None
    clusters = literal_clusters([vectors[i] for i in rows], threshold)
    clusters = [[rows[i] for i in c] for c in clusters]
    largest = max(clusters, key=lambda c: (len(c), np.mean([scores[i] for i in c])))
    largest = sorted(largest)

    def rank(i):
        overlaps = [literal_iou(masks[i], masks[j]) for j in largest]
        return sum(o >= iou_duplicate for o in overlaps), sum(overlaps), -i

    return max(largest, key=rank)


def literal_anchors(sam, image, points, *, distance_threshold):
    """Indices of the anchors (superpixel by superpixel) and their full-resolution masks."""
    n, k, _ = points.shape
    masks, scores = literal_proposals(sam, image, points)
    threshold = distance_threshold * np.sqrt(image.shape[0] * image.shape[1])
    chosen = []
    for i in range(n):
        rows = slice(i * k, (i + 1) * k)
        best = literal_anchor(masks[rows], scores[rows], threshold)
        chosen.append(-1 if best is None else i * k + best)
    return np.array(chosen), masks
