from .temporal import ModalEvent as ModalEvent  # temporary
