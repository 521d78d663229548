from .segmentation import NULL as NULL  # temporary
