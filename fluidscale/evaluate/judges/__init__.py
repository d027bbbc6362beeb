"""Published judges from local files: GenEval's detector, CLIP, Inception, DINOv2; `python -m` it to judge a folder."""
