from .labels import CHOICES as CHOICES  # temporary
